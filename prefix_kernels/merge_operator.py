"""Fake kernels, FLOP formulas and derivatives of ``prefix_kernels::merge``, and the same formula in PyTorch operations.

The operations serve what the operator has no kernel or rule for: function transforms, forward-mode and double
differentiation, DTensors, other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

merge = torch.ops.prefix_kernels.merge
merge_backward = torch.ops.prefix_kernels.merge_backward

MAX_PARTS = 32  # of one call: kMaxMergedParts of csrc/merge_params.h
DEVICES = frozenset(
    device
    for device, dispatch_key in (("cpu", "CPU"), ("cuda", "CUDA"), ("meta", "Meta"))
    if device == "meta" or torch._C._dispatch_has_kernel_for_dispatch_key("prefix_kernels::merge", dispatch_key)
)
"""Types of the devices that the operator runs on."""


def _compute_dtype(rows: Tensor, lses: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype is torch.float64 for x in (rows, *lses)) else torch.float32


def _shares(lses: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The shares ``[N, ...]`` of the parts, which sum to 1 where a row sees any, and the ``lse`` of all of them."""
    scores = torch.stack([lse.to(dtype) for lse in lses])
    scores = scores.masked_fill(scores == torch.inf, -torch.inf)
    largest = scores.amax(0).detach()
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = (scores - largest).exp()
    total = weights.sum(0)
    sees_none = total == 0
    total = total.masked_fill(sees_none, 1.0)
    return weights / total, (total.log() + largest).masked_fill(sees_none, -torch.inf)


def merge_by_operations(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``prefix_kernels::merge`` of any number of parts in PyTorch operations, differentiable as often as wanted."""
    dtype = _compute_dtype(outs[0], lses)
    shares, lse = _shares(lses, dtype)
    # A row without keys may hold anything, also NaN, which a product with a share of zero would keep.
    parts = (
        share * out.to(dtype).masked_fill(share == 0, 0.0)
        for share, out in zip(shares.unsqueeze(-1), outs, strict=True)
    )
    return torch.stack(list(parts)).sum(0).to(outs[0].dtype), lse


def _merge_backward_by_operations(
    dout: Tensor, dlse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """``prefix_kernels::merge_backward`` in PyTorch operations, itself differentiable."""
    dtype = _compute_dtype(dout, lses)
    shares, _ = _shares(lses, dtype)
    unseen = shares == 0
    arriving = dout.to(dtype)
    gradients = [
        (share * arriving).masked_fill(hidden, 0.0).to(dout.dtype)
        for share, hidden in zip(shares.unsqueeze(-1), unseen.unsqueeze(-1), strict=True)
    ]
    if any(needs[len(lses) :]):
        hidden_rows = unseen.unsqueeze(-1)
        dots = torch.stack(
            [
                (arriving * out.to(dtype)).masked_fill(hidden, 0.0).sum(-1)
                for out, hidden in zip(outs, hidden_rows, strict=True)
            ]
        )
        change = dots - (shares * dots).sum(0)
        if dlse is not None:
            change = change + dlse.to(dtype)
        gradients += [
            dlse_of_part.to(lse.dtype)
            for dlse_of_part, lse in zip((shares * change).masked_fill(unseen, 0.0), lses, strict=True)
        ]
    else:
        gradients += [dout.new_empty(0)] * len(lses)
    return gradients


def _check_devices(first: Tensor, first_name: str, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    # Shapes and dtypes are checked when the operator runs; a device would be settled by then.
    for name, tensors in (("outs", outs), ("lses", lses)):
        for i, x in enumerate(tensors):
            if x.device != first.device:
                raise ValueError(
                    f"{name}[{i}]: expected a tensor on {first.device} like {first_name}, got one on {x.device}"
                )


def _empty_rows(like: Tensor) -> Tensor:
    """A tensor of the shape of ``like`` with its order in memory, where the kernels can write it."""
    rows = torch.empty_like(like)
    if like.dim() > 4 or like.numel() == 0 or (like.shape[-1] > 1 and rows.stride(-1) != 1):
        rows = torch.empty_like(like, memory_format=torch.contiguous_format)
    return rows


@torch.library.register_fake("prefix_kernels::merge")
def _merge_fake(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _check_devices(outs[0], "outs[0]", outs, lses)
    return _empty_rows(outs[0]), outs[0].new_empty(outs[0].shape[:-1], dtype=_compute_dtype(outs[0], lses))


@torch.library.register_fake("prefix_kernels::merge_backward")
def _merge_backward_fake(
    dout: Tensor, dlse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    _check_devices(dout, "dout", outs, lses)
    gradients = [_empty_rows(dout) if need else dout.new_empty(0) for need in needs[: len(lses)]]
    for lse, need in zip(lses, needs[len(lses) :], strict=True):
        gradients.append(dout.new_empty(dout.shape[:-1], dtype=lse.dtype) if need else dout.new_empty(0))
    return gradients


def _save_for_backward(ctx: Any, inputs: tuple[list[Tensor], list[Tensor]], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.parts = len(lses)
    ctx.needs = list(ctx.needs_input_grad[: 2 * ctx.parts])
    # The gradients of outs are the shares, which follow from lses, times the gradient that arrives.
    ctx.save_for_backward(*lses, *(outs if any(ctx.needs[ctx.parts :]) else ()))
    ctx.out_shape, ctx.out_dtype = outs[0].shape, outs[0].dtype
    ctx.set_materialize_grads(False)


def _gradients_from_saved(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    parts: int = ctx.parts
    if dout is None and dlse is None:
        return [None] * parts, [None] * parts
    lses, outs = ctx.saved_tensors[:parts], ctx.saved_tensors[parts:]
    if dout is None:
        dout = lses[0].new_zeros(ctx.out_shape, dtype=ctx.out_dtype)
    # Gradients of these gradients are recorded, or a batch of gradients arrives (is_grads_batched=True).
    by_operations = torch.is_grad_enabled() or any(
        x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in (dout, dlse)
    )
    formula = _merge_backward_by_operations if by_operations else merge_backward
    computed = formula(dout, dlse, outs, lses, ctx.needs)
    gradients = [x if need else None for x, need in zip(computed, ctx.needs, strict=True)]
    return gradients[:parts], gradients[parts:]


def _refuse_double_backward(ctx: Any, *_gradients: Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "prefix_kernels::merge_backward: a gradient of the operator itself is not implemented; differentiate "
        "merge_attention twice, with create_graph=True"
    )


torch.library.register_autograd("prefix_kernels::merge", _gradients_from_saved, setup_context=_save_for_backward)
torch.library.register_autograd("prefix_kernels::merge_backward", _refuse_double_backward)

_Shape = Sequence[int]  # stands for a tensor in the arguments of a FLOP formula


def _numel(shape: _Shape) -> int:
    return torch.Size(shape).numel()


@register_flop_formula(torch.ops.prefix_kernels.merge)
def _merge_flops(outs: Sequence[_Shape], lses: Sequence[_Shape], *_: object, **__: object) -> int:
    """A multiplication and an addition for each element of each part."""
    return 2 * len(outs) * _numel(outs[0])


@register_flop_formula(torch.ops.prefix_kernels.merge_backward)
def _merge_backward_flops(
    dout: _Shape,
    dlse: _Shape | None,
    outs: Sequence[_Shape],
    lses: Sequence[_Shape],
    needs: Sequence[bool],
    *_: object,
    **__: object,
) -> int:
    dots = 2 * len(lses) if any(needs[len(lses) :]) else 0
    return (sum(needs[: len(lses)]) + dots) * _numel(dout)
