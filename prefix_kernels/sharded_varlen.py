"""Attention of packed sequences over tensors that are sharded over heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from prefix_kernels.sharded_attention import local_part, placements_of, seed_of_shard

_HEADS = 1


def sharded_varlen(
    attention: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    cu_prefix_lens: Tensor | None,
    prefix_ids: Tensor | None,
    prefix_lens: Tensor | None,
    query_offset: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
    **options: Any,
) -> DTensor | tuple[DTensor, DTensor]:
    """``attention`` on each process's heads of a sharded call.

    On every dimension of the mesh the query is split over heads, ``Shard(1)``, or not at all; keys, values and prefixes
    follow it. Lengths and ids are whole on every process. Dropout draws as in
    :func:`prefix_kernels.sharded_attention.sharded_attention`.

    Args:
        attention: :func:`prefix_kernels.prefix_attention_varlen`.
        query: ``[Tq, Hq, D]``, a DTensor.

    Returns:
        What ``attention`` returns, sharded like the query.

    Raises:
        TypeError: another input is a DTensor, and the query is not.
        ValueError: the query is split over another dimension, or key/value heads do not divide over the processes.
    """
    mesh, placements = placements_of(query, key, {_HEADS: "heads"})

    def local(tensor: Tensor | None, heads_dim: int | None) -> Tensor | None:
        return local_part(tensor, mesh, placements, {_HEADS: heads_dim})

    prefix_heads = None if prefix_key is None else prefix_key.dim() - (3 if cu_prefix_lens is None else 2)
    if dropout_p > 0.0:
        dropout_seed = seed_of_shard(dropout_seed, query, mesh, placements)
    result = attention(
        *(local(x, _HEADS) for x in (query, key, value)),
        *(local(x, prefix_heads) for x in (prefix_key, prefix_value)),
        *(local(x, None) for x in (cu_seqlens_q, cu_seqlens_k)),
        cu_prefix_lens=local(cu_prefix_lens, None),
        prefix_ids=local(prefix_ids, None),
        prefix_lens=local(prefix_lens, None),
        query_offset=local(query_offset, None),
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        **options,
    )
    rows, heads = query.shape[0], query.shape[1]
    value_dim = value.shape[-1]

    def whole(part: Tensor, parts: list[Placement], *shape: int) -> DTensor:
        size = torch.Size(shape)
        strides = torch.empty(size, device="meta").stride()
        return DTensor.from_local(part, mesh, parts, run_check=False, shape=size, stride=strides)

    if not return_lse:
        return whole(result, placements, rows, heads, value_dim)
    out, lse = result
    of_lse: list[Placement] = [Replicate() if placement == Replicate() else Shard(0) for placement in placements]
    return whole(out, placements, rows, heads, value_dim), whole(lse, of_lse, heads, rows)
