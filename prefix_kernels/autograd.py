"""The derivatives of ``prefix_kernels::forward``: for autograd, ``torch.compile`` and the transforms of ``torch.func``.

``torch.library.register_autograd`` serves eager autograd and ``torch.compile``. Function transforms (``grad``, ``vjp``,
``jacrev``, ``vmap`` and their mixes) need an ``autograd.Function`` with a ``setup_context`` and a batching rule of its
own; both ways share the formulas. ``torch.autograd.grad`` with ``is_grads_batched=True`` is such a transform too: it
runs the backward pass under ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from prefix_kernels import ops

_NUM_DIFFERENTIABLE = len(ops.DIFFERENTIABLE)
_NUM_TENSOR_OPTIONS = len(ops.TENSOR_OPTIONS)
# Results of a batched call, stacked, and the dimension of each that they are stacked in.
_Stacked = tuple[tuple[Tensor, ...], tuple[int, ...]]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep what the gradients asked for need: the ``setup_context`` of ``prefix_kernels::forward``.

    Raises:
        ValueError: ``attn_mask`` requires a gradient.
    """
    if ctx.needs_input_grad[_NUM_DIFFERENTIABLE]:
        raise ValueError(
            "attn_mask: expected a mask that does not require a gradient, got requires_grad=True; detach it"
        )
    query, key, value, prefix_key, prefix_value, *options = inputs
    out, lse, row_mass = output
    needs = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    kept, ds = ops.needed_for_backward(needs, query, key, value, prefix_key, prefix_value, out, lse)
    ctx.save_for_backward(
        *kept,
        row_mass if row_mass.numel() > 0 else None,
        *options[:_NUM_TENSOR_OPTIONS],
    )
    ctx.options = options[_NUM_TENSOR_OPTIONS:]
    ctx.key_len = key.shape[2]
    ctx.value_dim = value.shape[3]
    ctx.needs = needs
    ctx.uses_dlse = ds
    ctx.set_materialize_grads(False)


def gradients_from_saved(
    ctx: Any,
    dout: Tensor | None,
    dlse: Tensor | None,
    drow_mass: None,
    *,
    operator: Callable[..., Sequence[Tensor]] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of ``prefix_kernels::forward``: its ``backward``.

    The kernels form probabilities as ``exp(score - lse)``. Those of a row whose lse has lost the logarithm of its sum,
    as with a mask of -1e9 or the least float everywhere, are too large by one factor, ``row_mass``. Gradients are
    linear in probability times incoming gradient, so the incoming ones are divided by it.

    Args:
        operator: takes and returns what ``prefix_kernels::backward`` does. Default: that operator.
    """
    query, key, value, prefix_key, prefix_value, out, lse, row_mass, *tensor_options = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * (_NUM_DIFFERENTIABLE + ops.NUM_OPTIONS)
    if dout is None and dlse is None:
        return tuple(gradients)
    if dout is None:
        dout = query.new_zeros(*query.shape[:-1], ctx.value_dim)
    if row_mass is not None:
        dout = (dout / row_mass.unsqueeze(-1)).to(dout.dtype)
        dlse = None if dlse is None else dlse / row_mass
    if operator is None:
        operator = _Backward.apply if under_transform() else ops.backward
    computed = operator(
        dout,
        dlse if ctx.uses_dlse else None,
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        out,
        lse,
        *tensor_options,
        *ctx.options,
        ctx.key_len,
        ctx.needs,
    )
    for i, need in enumerate(ctx.needs):
        if need:
            gradients[i] = computed[i]
    return tuple(gradients)


def refuse_double_backward(ctx: Any, *_gradients: Tensor | None) -> NoReturn:
    """Raise NotImplementedError: there is no formula for the derivative of the backward pass."""
    raise NotImplementedError(
        "prefix_attention: double backward is not implemented; compute higher-order gradients with "
        "prefix_kernels.reference.prefix_attention_reference"
    )


torch.library.register_autograd("prefix_kernels::forward", gradients_from_saved, setup_context=save_for_backward)
torch.library.register_autograd("prefix_kernels::backward", refuse_double_backward)


def under_transform() -> bool:
    """Return True in a call that a transform of ``torch.func`` makes."""
    return torch._C._are_functorch_transforms_active()


# Dynamo cannot trace an autograd.Function below a transform: code that it compiles runs such a transform eagerly.
@torch.compiler.disable
def forward_under_transform(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``prefix_kernels::forward`` under any stack of transforms."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # Here and not in the operator, so that what is saved for backward has the dtype of the result.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (ops.cast_as_autocast(x, dtype) for x in (query, key, value))
    outputs: tuple[Tensor, Tensor, Tensor] = _Forward.apply(query, key, value, *rest)
    return outputs


def refuse_forward_mode() -> NoReturn:
    """Raise NotImplementedError: there is no formula for forward-mode differentiation."""
    raise NotImplementedError(
        "prefix_attention: forward-mode AD is not implemented; compute Jacobian-vector products with "
        "prefix_kernels.reference.prefix_attention_reference"
    )


class _Forward(torch.autograd.Function):
    """``prefix_kernels::forward`` for transforms."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = ops.forward(*arguments)
        return outputs

    setup_context = staticmethod(save_for_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode()

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, drow_mass: None) -> tuple[Tensor | None, ...]:
        return gradients_from_saved(ctx, dout, dlse, drow_mass)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> _Stacked:
        stacked: _Stacked = _one_by_one(_Forward.apply, info.batch_size, in_dims, arguments)
        return stacked


class _Backward(torch.autograd.Function):
    """``prefix_kernels::backward`` for transforms."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = ops.backward(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(refuse_double_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> _Stacked:
        stacked: _Stacked = _one_by_one(_Backward.apply, info.batch_size, in_dims, arguments)
        return stacked


# Dynamo cannot trace the call of an autograd.Function in the backward pass of a transform either.
@torch.compiler.disable
def _one_by_one(
    operator: Callable[..., Sequence[Tensor]], count: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> _Stacked:
    """Call ``operator`` for each element of the batch dimension and stack the results along a new first dimension."""

    def elements(argument: Any, dim: Any) -> Sequence[Any]:
        if not isinstance(argument, Tensor) or dim is None:
            return [argument] * max(count, 1)
        batched = argument.movedim(dim, 0)
        # The kernels need stride 1 in the last dimension, which a batch dimension behind it takes away.
        if batched.dim() > 1 and batched.shape[-1] > 1 and batched.stride(-1) != 1:
            batched = batched.contiguous()
        return batched.unbind(0) if count else [batched.new_zeros(batched.shape[1:])]

    columns = [elements(argument, dim) for argument, dim in zip(arguments, in_dims, strict=True)]
    results = [operator(*row) for row in zip(*columns, strict=True)]
    # An empty batch has results too, of the shape that one element would have.
    stacked = tuple(torch.stack(column)[:count] for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
