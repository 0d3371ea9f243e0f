"""Attention of packed sequences: the rows of all sequences one behind the other, without padding."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from prefix_kernels import packed_operator
from prefix_kernels.arguments import check_number, check_tensors, window_of


@overload
def prefix_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    cu_prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
    window_includes_prefix: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor: ...


@overload
def prefix_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    cu_prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
    window_includes_prefix: bool = False,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def prefix_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    cu_prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    window_includes_prefix: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each of N packed sequences over ``[prefix ; sequence]``, without the concatenation; on a CPU.

    Sequence n is the rows ``cu_seqlens_q[n] : cu_seqlens_q[n + 1]`` of ``query`` and ``cu_seqlens_k[n] : cu_seqlens_k[n
    + 1]`` of ``key`` and ``value``, and gets what :func:`prefix_kernels.prefix_attention` computes for it alone. A
    sequence without queries or without keys is allowed.

    A bank of prefixes may be packed too, and may be live: with ``prefix_key=key``, ``prefix_value=value`` and
    ``cu_prefix_lens=cu_seqlens_k``, sequence n sees its own keys and, whole, those of the sequences that
    ``prefix_ids[n]`` names, its ancestors in order. That is attention of a tree: a prompt and its responses, or turns
    that branch. The gradients of an ancestor's keys are summed over all that name it.

    DTensors split over heads are taken too, see :func:`prefix_kernels.sharded_varlen.sharded_varlen`.

    Args:
        query: ``[Tq, Hq, D]``, D from 1 to 256; any strides with ``stride(-1) == 1``. float64, float32, bfloat16 or
            float16.
        key: ``[Tk, Hkv, D]`` in the query's dtype; Hkv divides Hq.
        value: ``[Tk, Hkv, Dv]``, Dv from 1 to 256.
        prefix_key: ``[Hkv, P, D]``, one prefix for all sequences; ``[Np, Hkv, P, D]``, a bank; or with
            ``cu_prefix_lens`` a packed bank ``[Tp, Hkv, D]``. Default: no prefix.
        prefix_value: like ``prefix_key``, with Dv in place of D.
        cu_seqlens_q: int32 or int64 ``[N + 1]``, from 0 to Tq.
        cu_seqlens_k: likewise, from 0 to Tk. Default: ``cu_seqlens_q``.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence. Default: found.
        dropout_p, is_causal, scale, window_size, softcap, window_includes_prefix, dropout_seed: as in
            :func:`prefix_kernels.prefix_attention`.
        prefix_ids: int32 or int64 ``[N]`` or ``[N, M]``, the prefixes that each sequence sees, one after another; -1 is
            none. Default: prefix n for sequence n, or the only one for all.
        prefix_lens: int32 or int64 ``[Np]``, the valid lengths of a bank that is not packed.
        cu_prefix_lens: int32 or int64 ``[Np + 1]``, from 0 to Tp.
        query_offset: int32 or int64 ``[N]``, the position of the first query among the keys of its sequence. Default:
            the last query is at the last key.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        ``out`` ``[Tq, Hq, Dv]`` in the query's dtype, and with ``return_lse=True`` also ``lse`` ``[Hq, Tq]``, natural
        log, float32 (float64 for float64), differentiable. A row that sees no key has ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: a shape, stride, layout, device or number is not as described.
        TypeError: a type or dtype is not as described.
        IndexError: ``cu_seqlens_q``, ``cu_seqlens_k``, ``cu_prefix_lens``, ``prefix_ids`` or ``prefix_lens`` hold a
            value out of range.
        NotImplementedError: the tensors are not on a CPU; or double backward.

    Reference: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021.
    """
    if cu_seqlens_q is None:
        raise ValueError("cu_seqlens_q: expected int32 or int64 [N + 1], the rows that divide the sequences, got None")
    if (prefix_key is None) != (prefix_value is None):
        missing, given = ("prefix_key", "prefix_value") if prefix_key is None else ("prefix_value", "prefix_key")
        raise ValueError(f"{missing}: expected a tensor like {given}, got None")
    for name, x in (("prefix_ids", prefix_ids), ("prefix_lens", prefix_lens), ("cu_prefix_lens", cu_prefix_lens)):
        if x is not None and prefix_key is None:
            raise ValueError(f"{name}: expected None without prefix_key, got shape {list(x.shape)}")
    check_number("dropout_p", dropout_p)
    check_number("softcap", softcap)
    if scale is not None:
        check_number("scale", scale)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length is not None:
            check_number(name, length, integer=True)
    window = window_of(window_size)
    tensors = {
        "prefix_key": prefix_key,
        "prefix_value": prefix_value,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        "cu_prefix_lens": cu_prefix_lens,
        "prefix_ids": prefix_ids,
        "prefix_lens": prefix_lens,
        "query_offset": query_offset,
        "dropout_seed": dropout_seed,
    }
    check_tensors({"query": query, "key": key, "value": value}, tensors)
    if any(hasattr(x, "device_mesh") for x in (query, key, value, prefix_key, prefix_value)):
        from prefix_kernels.sharded_varlen import sharded_varlen

        return sharded_varlen(
            *(prefix_attention_varlen, query, key, value, prefix_key, prefix_value),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            cu_prefix_lens=cu_prefix_lens,
            prefix_ids=prefix_ids,
            prefix_lens=prefix_lens,
            query_offset=query_offset,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            window_size=window,
            softcap=softcap,
            return_lse=return_lse,
            window_includes_prefix=window_includes_prefix,
            dropout_seed=dropout_seed,
        )
    if query.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"query: expected a tensor on a CPU, where prefix_attention_varlen runs, got one on {query.device}"
        )
    if dropout_p > 0.0 and dropout_seed is None:
        tensors["dropout_seed"] = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    out, lse = packed_operator.forward(
        *(query, key, value, *tensors.values()),
        *(-1 if max_seqlen_q is None else max_seqlen_q, -1 if max_seqlen_k is None else max_seqlen_k),
        *(dropout_p, is_causal, scale, *window, window_includes_prefix, softcap),
    )
    return (out, lse) if return_lse else out
