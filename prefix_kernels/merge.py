"""Merging attention over disjoint sets of keys by the logsumexps of their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prefix_kernels import autograd, merge_operator

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention of the same queries over disjoint sets of keys into that over all of the keys.

    ``out = sum_i exp(lse_i - lse) * out_i`` with ``lse = log(sum_i exp(lse_i))``. The parts may come from anywhere:
    from ``prefix_attention(..., return_lse=True)``, from PyTorch's attention operators, from another process. It is
    differentiable in ``outs`` and ``lses`` and runs under ``torch.compile`` and ``torch.func``.

    Args:
        outs: at least one ``[..., Dv]``, such as ``[B, Hq, Sq, Dv]``, all of the same shape, dtype and device.
        lses: as many ``[...]``, the natural logarithms of the sums of exponentiated scores. ``-inf`` marks a query that
            sees none of the part's keys; so does ``+inf``, which PyTorch's flash attention writes there. What such a
            row of ``outs`` holds does not matter.

    Returns:
        ``out`` in the dtype of ``outs`` and ``lse`` in the widest dtype of ``lses`` (at least float32). A query that
        sees no key of any part has zeros and ``-inf``.

    Raises:
        TypeError: something other than sequences of floating-point tensors.
        ValueError: no parts, or parts that do not belong together.
    """
    _check_parts(outs, lses)
    if not _has_kernel(outs, lses):
        return merge_operator.merge_by_operations(outs, lses)
    outs, lses = list(outs), list(lses)
    while len(outs) > merge_operator.MAX_PARTS:
        first = slice(merge_operator.MAX_PARTS)
        out, lse = merge_operator.merge(outs[first], lses[first])
        outs[first], lses[first] = [out], [lse]
    merged: tuple[Tensor, Tensor] = merge_operator.merge(outs, lses)
    return merged


def _has_kernel(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    """Return False for a call that is left to PyTorch operations."""
    if outs[0].device.type not in merge_operator.DEVICES or autograd.under_transform():
        return False
    tensors = (*outs, *lses)
    if any(hasattr(x, "device_mesh") for x in tensors):
        return False
    # An operator without a formula for forward mode would drop the tangents.
    return forward_ad._current_level < 0 or all(forward_ad.unpack_dual(x).tangent is None for x in tensors)


def _check_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, tensors in (("outs", outs), ("lses", lses)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name}: expected a sequence of tensors, got a {type(tensors).__name__}")
        for i, x in enumerate(tensors):
            if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name}[{i}]: expected a floating-point tensor, got {got}")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses: expected as many as outs, and at least one, got {len(lses)} for {len(outs)} outs")
    first = outs[0]
    if first.dim() == 0:
        raise ValueError("outs[0]: expected [..., Dv], got a tensor without dimensions")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if (out.shape, out.dtype, out.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"outs[{i}]: expected {list(first.shape)}, {first.dtype}, {first.device} as outs[0], got "
                f"{list(out.shape)}, {out.dtype}, {out.device}"
            )
        if lse.shape != first.shape[:-1] or lse.device != first.device:
            raise ValueError(
                f"lses[{i}]: expected {list(first.shape[:-1])} on {first.device}, the shape of outs without its last "
                f"dimension, got {list(lse.shape)} on {lse.device}"
            )
