"""The functional interface: what a call to ``scaled_dot_product_attention`` becomes."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prefix_kernels import autograd, ops
from prefix_kernels.arguments import check_number, check_tensors, window_of
from prefix_kernels.backends import split
from prefix_kernels.backends.call import Call
from prefix_kernels.backends.choice import BackendChoice, choice_of, choose, is_always_fused
from prefix_kernels.backends.setting import Backend, resolved_backend

# The largest head dim, of queries and keys or of values, that the kernels take: kMaxHeadDim of csrc/attention_params.h.
MAX_HEAD_DIM = 256


def _refuse_tangents(*inputs: Tensor | None) -> None:
    # An operator without a formula for forward mode would drop the tangent.
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        autograd.refuse_forward_mode()


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: int | Tensor | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
    window_includes_prefix: bool = False,
    dropout_seed: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor: ...


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: int | Tensor | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
    window_includes_prefix: bool = False,
    dropout_seed: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: int | Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool,
    window_includes_prefix: bool = False,
    dropout_seed: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: int | Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    window_includes_prefix: bool = False,
    dropout_seed: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention over ``[prefix ; sequence]`` keys and values, without the concatenation.

    .. math::
        K' = [P_k ; K], \quad V' = [P_v ; V], \quad
        \mathrm{out} = \mathrm{softmax}(\mathrm{scale} \cdot Q K'^T + \mathrm{mask})\, V'

    It equals this PyTorch code, which builds what this function does not::

        keys = torch.cat([prefix_key.expand(B, -1, -1, -1), key], dim=2)
        values = torch.cat([prefix_value.expand(B, -1, -1, -1), value], dim=2)
        out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    With ``is_causal=True``, ``P = 2``, ``Sq = 3`` and ``Sk = 4``, a query (row) sees the keys (columns)::

        prefix  sequence
        1 1     1 1 0 0
        1 1     1 1 1 0
        1 1     1 1 1 1

    Gradients flow to whichever of ``query``, ``key``, ``value``, ``prefix_key``, ``prefix_value`` asks for one, and the
    backward pass does the work of that set alone; with prefix gradients only, ``key`` and ``value`` are not kept.
    Batched gradients (``is_grads_batched``) and the transforms of ``torch.func`` (``grad``, ``vjp``, ``jacrev``,
    ``vmap``) work, one element of the batch after another. Double backward and forward mode are refused.

    DTensors are taken too, see :func:`prefix_kernels.sharded_attention.sharded_attention`.

    Args:
        query: ``[B, Hq, Sq, D]``, D from 1 to 256; any strides with ``stride(-1) == 1``. float64, float32, bfloat16 or
            float16.
        key: ``[B, Hkv, Sk, D]`` in the query's dtype; Hkv divides Hq (grouped-query attention). Sk may be 0.
        value: ``[B, Hkv, Sk, Dv]``, Dv from 1 to 256; it may differ from D, as in multi-head latent attention.
        prefix_key: ``[Hkv, P, D]``, one prefix of length P for all rows; ``[B, Hkv, P, D]``, one for each; or with
            ``prefix_ids`` a bank ``[N, Hkv, P, D]``. Its dtype may differ from the query's: it is converted as it is
            read, and its gradient has its own dtype. Default: no prefix.
        prefix_value: like ``prefix_key``, with the head dim Dv of ``value`` in place of D.
        attn_mask: bool (True: attend) or floating (added to the scores), broadcastable to ``[B, Hq, Sq, Sk]``, which
            leaves the prefix visible, or to ``[B, Hq, Sq, M * P + Sk]``. A last dimension of ``Sk`` means the sequence.
            It combines with ``is_causal``. Added numbers are read as float32 where the query is not float64: one below
            float32's range hides its key, as -inf does. A mask that requires a gradient is refused.
        dropout_p: probability of dropping an attention weight, rounded to a multiple of 1/65536.
        is_causal: query i sees sequence key j when ``j <= i + query_offset``; the prefix is always visible.
        scale: factor on the scores. Default: ``1 / sqrt(D)``.
        prefix_ids: int32 or int64 ``[B]``, the prefix of the bank that each row sees, or ``[B, M]``, several seen one
            after another; -1 is none.
        prefix_lens: int32 or int64 ``[N]``, the valid length of each prefix. Default: P.
        window_size: ``(left, right)`` limits the sequence keys to ``i + query_offset - left <= j <= i + query_offset +
            right``; -1 is no limit. The prefix stays visible.
        query_offset: position of the first query among the sequence keys, an int or int32/int64 ``[B]``. Default:
            ``Sk - Sq``, so that the last query sees the last key.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask, from 1e-30 to 1e30; 0 is off.
        return_lse: also return the log-sum-exp of each row's scores.
        window_includes_prefix: the left window counts prefix keys as the positions before the sequence, so that the
            prefix slides out of sight.
        dropout_seed: int64 ``[1]``, which fixes the dropped elements. Default: drawn from torch's default generator.
        backend: ``"auto"``, ``"fused"``, ``"split"`` or ``"benchmark"``, see :class:`prefix_kernels.attention_backend`,
            whose setting is the default.

    Returns:
        ``out`` ``[B, Hq, Sq, Dv]`` in the query's dtype, laid out in memory as ``[B, Sq, Hq, Dv]``, and with
        ``return_lse=True`` also ``lse`` ``[B, Hq, Sq]``, natural log, float32 (float64 for float64), differentiable. A
        row that sees no key has ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: a shape, stride, layout, device or number is not as described, or ``backend="split"`` cannot serve.
        TypeError: a type or dtype is not as described.
        IndexError: a value of ``prefix_ids`` or ``prefix_lens`` is out of range, on a CPU; a GPU prints it and traps.

    Reference: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021.
    """
    if any(hasattr(x, "device_mesh") for x in (query, key, value, prefix_key, prefix_value)):
        from prefix_kernels.sharded_attention import sharded_attention

        return sharded_attention(
            prefix_attention,
            query,
            key,
            value,
            prefix_key,
            prefix_value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            prefix_ids=prefix_ids,
            prefix_lens=prefix_lens,
            window_size=window_size,
            query_offset=query_offset,
            softcap=softcap,
            return_lse=return_lse,
            window_includes_prefix=window_includes_prefix,
            dropout_seed=dropout_seed,
            backend=backend,
        )
    asked = resolved_backend(backend)
    check_number("dropout_p", dropout_p)
    check_number("softcap", softcap)
    if scale is not None:
        check_number("scale", scale)
    if query_offset is not None and not isinstance(query_offset, Tensor):
        check_number("query_offset", query_offset, integer=True)
    window = window_of(window_size)
    query_offsets = query_offset if isinstance(query_offset, Tensor) else None
    tensors = {
        "prefix_key": prefix_key,
        "prefix_value": prefix_value,
        "attn_mask": attn_mask,
        "prefix_ids": prefix_ids,
        "prefix_lens": prefix_lens,
        "query_offset": query_offsets,
        "dropout_seed": dropout_seed,
    }
    try:
        if dropout_p > 0.0 and dropout_seed is None:
            tensors["dropout_seed"] = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
        if forward_ad._current_level >= 0:
            _refuse_tangents(query, key, value, prefix_key, prefix_value, attn_mask)
        if not is_always_fused(asked, query):
            prefixes = prefix_key, prefix_value
            options = (*prefixes, attn_mask, dropout_p, is_causal, scale, prefix_ids, prefix_lens, window)
            call = Call(query, key, value, *options, query_offset, softcap)
            if choose(call, asked, prefix_attention) == "split":
                causal, required = call.sees_up_to_itself, asked == "split"
                out, lse = split.forward(query, key, value, *prefixes, prefix_ids, prefix_lens, causal, scale, required)
                return (out, lse) if return_lse else out
        forward = autograd.forward_under_transform if autograd.under_transform() else ops.forward
        out, lse, _ = forward(
            query,
            key,
            value,
            *tensors.values(),
            dropout_p,
            is_causal,
            scale,
            None if query_offsets is not None else query_offset,
            *window,
            window_includes_prefix,
            softcap,
        )
    except (AttributeError, TypeError, ValueError, RuntimeError):
        # The dispatcher's own words are for those who wrote the operator. Asked beforehand, this would cost every call.
        check_tensors({"query": query, "key": key, "value": value}, tensors)
        raise
    return (out, lse) if return_lse else out


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: int | Tensor | None = None,
    softcap: float = 0.0,
    backend: Backend | None = None,
    **_others: object,
) -> BackendChoice:
    """Say which backend would compute a call of :func:`prefix_attention` with these arguments, and why.

    Nothing is computed. ``print`` of the result is one line, such as ``fused: attn_mask: expected None; sequence by
    prefix_kernels, prefix by prefix_kernels``: what keeps PyTorch's kernels from serving is named.

    Raises:
        ValueError: ``backend="split"``, and it cannot serve; or another name.
        TypeError: a tensor or number is none.
    """
    required = {"query": query, "key": key, "value": value}
    check_tensors(required, {"prefix_key": prefix_key, "prefix_value": prefix_value, "attn_mask": attn_mask})
    check_number("dropout_p", dropout_p)
    check_number("softcap", softcap)

    def local(x: Any) -> Any:
        """The shard of this process, which is what it computes of a sharded call."""
        return x.to_local() if hasattr(x, "to_local") else x

    prefixes = local(prefix_key), local(prefix_value)
    options = (*prefixes, attn_mask, dropout_p, is_causal, scale, prefix_ids, prefix_lens, window_of(window_size))
    call = Call(local(query), local(key), local(value), *options, query_offset, softcap)
    return choice_of(call, resolved_backend(backend))
