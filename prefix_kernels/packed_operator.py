"""Fake kernels, autocast and derivatives of the packed operators of ``csrc/ops.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from prefix_kernels import ops

forward = torch.ops.prefix_kernels.packed_forward
backward = torch.ops.prefix_kernels.packed_backward

_TENSOR_OPTIONS = (
    *("cu_seqlens_q", "cu_seqlens_k", "cu_prefix_lens"),
    *("prefix_ids", "prefix_lens", "query_offset", "dropout_seed"),
)
_NUM_DIFFERENTIABLE = len(ops.DIFFERENTIABLE)


@torch.library.register_fake("prefix_kernels::packed_forward")
def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    ops.check_devices(query, zip((*ops.DIFFERENTIABLE[1:], *_TENSOR_OPTIONS), rest, strict=False))
    rows, heads, _ = query.shape
    lse = query.new_empty(heads, rows, dtype=ops.lse_dtype(query))
    return query.new_empty(rows, heads, rest[1].shape[-1]), lse


@torch.library.register_fake("prefix_kernels::packed_backward")
def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs: Sequence[bool] = rest[-1]
    likes = ops.likes_of_gradients(query, key, value, prefix_key, prefix_value)
    head_dim, value_dim = query.shape[-1], dout.shape[-1]
    head_dims = (head_dim, head_dim, value_dim, head_dim, value_dim)
    return tuple(
        like.new_empty(*like.shape[:-1], dim) if need and like is not None else query.new_empty(0)
        for like, dim, need in zip(likes, head_dims, needs, strict=True)
    )


ops.register_autocast("packed_forward")


def _lengths(starts: Tensor, longest: int, rows: int) -> list[int]:
    """The lengths of packed sequences; of a tensor without values, as PyTorch's formulas have it, the longest's."""
    if starts.device.type != "meta" and not isinstance(starts, FakeTensor):
        lengths: list[int] = starts.diff().tolist()
        return lengths
    return [rows if longest < 0 else longest] * (starts.shape[0] - 1)


def _pairs(query: Tensor, prefix_key: Tensor | None, key_rows: int, options: Sequence[Any]) -> tuple[int, int]:
    """Pairs of a query and a prefix's key, and of a query and a sequence's; masks are not counted, as PyTorch does."""
    starts_q, starts_k, cu_prefix_lens, prefix_ids, prefix_lens, *rest = options
    q_lens = _lengths(starts_q, rest[2], query.shape[0])
    k_lens = _lengths(starts_k, rest[3], key_rows)
    heads, sequence = query.shape[1], sum(q * k for q, k in zip(q_lens, k_lens, strict=True))
    if prefix_key is None:
        return 0, heads * sequence
    if cu_prefix_lens is not None:
        lengths = _lengths(cu_prefix_lens, -1, prefix_key.shape[0])
    else:
        lengths = [prefix_key.shape[-2]] * (1 if prefix_key.dim() == 3 else prefix_key.shape[0])
    if prefix_ids is None:
        seen = lengths * len(q_lens) if len(lengths) == 1 else lengths
    elif prefix_ids.device.type == "meta" or isinstance(prefix_ids, FakeTensor):
        seen = [max(lengths, default=0) * prefix_ids[0].numel()] * len(q_lens)
    else:
        rows = prefix_ids.reshape(len(q_lens), -1).tolist()
        seen = [sum(lengths[slot] for slot in row if slot >= 0) for row in rows]
    return heads * sum(q * p for q, p in zip(q_lens, seen, strict=True)), heads * sequence


@register_flop_formula(forward, get_raw=True)
def _forward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *options: Any,
    out_val: object = None,
) -> int:
    head_dims = query.shape[2] + value.shape[2]
    return 2 * head_dims * sum(_pairs(query, prefix_key, key.shape[0], options))


@register_flop_formula(backward, get_raw=True)
def _backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    *options: Any,
    out_val: object = None,
) -> int:
    *rest, key_rows, needs = options
    prefix, sequence = _pairs(query, prefix_value if prefix_key is None else prefix_key, key_rows, rest)
    return ops.backward_flops_of_pairs(prefix, sequence, query.shape[2], dout.shape[2], needs)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, prefix_key, prefix_value, *options = inputs
    out, lse = output
    needs = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    kept, ds = ops.needed_for_backward(needs, query, key, value, prefix_key, prefix_value, out, lse)
    ctx.save_for_backward(*kept, *options[: len(_TENSOR_OPTIONS)])
    ctx.options = options[len(_TENSOR_OPTIONS) :]
    ctx.key_rows, ctx.value_dim = value.shape[0], value.shape[2]
    ctx.needs, ctx.uses_dlse = needs, ds
    ctx.set_materialize_grads(False)


def _gradients_from_saved(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, prefix_key, prefix_value, out, lse, *tensor_options = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * (_NUM_DIFFERENTIABLE + len(_TENSOR_OPTIONS) + len(ctx.options))
    if dout is None and dlse is None:
        return tuple(gradients)
    if dout is None:
        dout = query.new_zeros(*query.shape[:-1], ctx.value_dim)
    computed = backward(
        *(dout, dlse if ctx.uses_dlse else None, query, key, value, prefix_key, prefix_value, out, lse),
        *(*tensor_options, *ctx.options, ctx.key_rows, ctx.needs),
    )
    for i, need in enumerate(ctx.needs):
        if need:
            gradients[i] = computed[i]
    return tuple(gradients)


def _refuse_double_backward(ctx: Any, *_gradients: Tensor | None) -> NoReturn:
    raise NotImplementedError("prefix_attention_varlen: double backward is not implemented")


torch.library.register_autograd(
    "prefix_kernels::packed_forward", _gradients_from_saved, setup_context=_save_for_backward
)
torch.library.register_autograd("prefix_kernels::packed_backward", _refuse_double_backward)
