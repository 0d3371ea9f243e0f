"""Fake kernels, autocast and derivatives of the packed operators of ``csrc/ops.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

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
