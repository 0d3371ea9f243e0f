"""Attention over sharded tensors: the rule by which a :class:`~torch.distributed.tensor.DTensor` call is split.

A query split over the batch or over heads is attended to where it lies; nothing is communicated for it in the forward
pass beyond what it takes to bring the other tensors into matching shards. See :func:`sharded_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

_BATCH, _HEADS = 0, 1


def sharded_attention(
    attention: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    attn_mask: Tensor | None,
    prefix_ids: Tensor | None,
    prefix_lens: Tensor | None,
    query_offset: Tensor | int | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
    **options: object,
) -> DTensor | tuple[DTensor, DTensor]:
    """``attention`` on each process's part of a sharded call.

    On every dimension of the mesh the query is split over the batch, ``Shard(0)``, over heads, ``Shard(1)``, or not at
    all, and the rest follows it: keys and values in the same way; prefixes over heads, or whole where the batch is
    split, their gradients then summed. Masks, ids and offsets are split where they have a batch or head dimension. A
    plain tensor counts as one that all processes hold whole.

    With dropout each shard draws from a seed of its own, made of ``dropout_seed`` and its place in the mesh: which
    elements are dropped depends on how many shards there are.

    Args:
        attention: :func:`prefix_kernels.prefix_attention`.
        query: ``[B, Hq, Sq, D]``, a DTensor.

    Returns:
        What ``attention`` returns, sharded like the query.

    Raises:
        TypeError: another input is a DTensor, and the query is not.
        ValueError: the query is split over another dimension, or key/value heads do not divide over the processes.
    """
    mesh, placements = placements_of(query, key, {_BATCH: "batch", _HEADS: "heads"})

    def local(tensor: Tensor | None, batch_dim: int | None, heads_dim: int | None) -> Tensor | None:
        return local_part(tensor, mesh, placements, {_BATCH: batch_dim, _HEADS: heads_dim})

    per_row = prefix_key is not None and prefix_key.dim() == 4 and prefix_ids is None
    prefix_dims = (0 if per_row else None, None if prefix_key is None else prefix_key.dim() - 3)
    if attn_mask is not None:
        dims = [attn_mask.dim() - 4, attn_mask.dim() - 3]
        attn_mask = local(attn_mask, *(dim if dim >= 0 and attn_mask.shape[dim] > 1 else None for dim in dims))
    if dropout_p > 0.0:
        dropout_seed = seed_of_shard(dropout_seed, query, mesh, placements)

    result = attention(
        local(query, 0, 1),
        local(key, 0, 1),
        local(value, 0, 1),
        local(prefix_key, *prefix_dims),
        local(prefix_value, *prefix_dims),
        attn_mask=attn_mask,
        prefix_ids=local(prefix_ids, 0, None),
        prefix_lens=local(prefix_lens, None, None),
        query_offset=local(query_offset, 0, None) if isinstance(query_offset, Tensor) else query_offset,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        **options,
    )
    batch, heads, q_len, _ = query.shape
    value_dim = value.shape[-1]
    out = DTensor.from_local(
        result[0] if return_lse else result,
        mesh,
        placements,
        run_check=False,
        shape=torch.Size((batch, heads, q_len, value_dim)),
        stride=(q_len * heads * value_dim, value_dim, heads * value_dim, 1),
    )
    if not return_lse:
        return out
    lse = DTensor.from_local(
        result[1],
        mesh,
        placements,
        run_check=False,
        shape=torch.Size((batch, heads, q_len)),
        stride=(heads * q_len, q_len, 1),
    )
    return out, lse


def placements_of(query: Tensor, key: Tensor, splits: Mapping[int, str]) -> tuple[DeviceMesh, list[Placement]]:
    """The mesh of a sharded ``query``, and how it is split over each dimension of it.

    Args:
        splits: the dimensions of the query over which it may be split, and their names. In both, 1 is heads.

    Raises:
        TypeError, ValueError: as in :func:`sharded_attention`.
    """
    if not isinstance(query, DTensor):
        raise TypeError(f"query: expected a DTensor like the other inputs, got {type(query).__name__}")
    mesh = query.device_mesh
    placements = [Replicate() if isinstance(p, Partial) else p for p in query.placements]
    for dim, placement in enumerate(placements):
        if placement != Replicate() and placement not in [Shard(split) for split in splits]:
            allowed = " and ".join(f"Shard({split}) ({name})" for split, name in splits.items())
            raise ValueError(f"query: expected placements among Replicate(), {allowed}, got {placement}")
        if placement == Shard(_HEADS) and key.shape[1] % mesh.size(dim):
            raise ValueError(
                f"key: expected a number of heads that divides over {mesh.size(dim)} processes, got {key.shape[1]}"
            )
    return mesh, placements


def local_part(
    tensor: Tensor | None, mesh: DeviceMesh, placements: Sequence[Placement], split_dims: Mapping[int, int | None]
) -> Tensor | None:
    """The part of ``tensor`` on this process.

    Args:
        placements: those of the query.
        split_dims: for each dimension over which the query may be split, that of ``tensor`` which follows it, if any.
    """
    if tensor is None:
        return None
    parts: list[Placement] = []
    gradients: list[Placement] = []
    for placement in placements:
        dim = split_dims.get(placement.dim) if isinstance(placement, Shard) else None
        parts.append(Replicate() if dim is None else Shard(dim))
        # A tensor kept whole where the query is split gets a part of its gradient from every process.
        partial = dim is None and placement != Replicate()
        gradients.append(Partial() if partial else parts[-1])
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return tensor.redistribute(mesh, parts).to_local(grad_placements=gradients)


def seed_of_shard(seed: Tensor | None, query: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """A seed of dropout for this process, from that of the whole call; None: a new one."""
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    elif isinstance(seed, DTensor):
        seed = seed.full_tensor()
    place = 0
    for dim, placement in enumerate(placements):
        if placement != Replicate():
            place = place * mesh.size(dim) + mesh.get_local_rank(dim)
    # Far apart for neighbours: an odd constant with about as many ones as zeros (2^64 over the golden ratio).
    return seed + place * -0x61C8864680B583EB
