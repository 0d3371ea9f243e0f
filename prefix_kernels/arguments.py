"""Checks of the arguments that the functional interfaces share, in words that name the argument."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor


def window_of(window_size: tuple[int, int]) -> tuple[int, int]:
    """Return ``window_size`` as two integers.

    Raises:
        ValueError: it is no pair.
        TypeError: one is no integer.
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"window_size: expected (left, right), got {window_size!r}") from None
    check_number("window_size", left, integer=True)
    check_number("window_size", right, integer=True)
    return left, right


def check_tensors(required: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """Raise for the first argument that the dispatcher finds no kernel for, in words that name it."""
    for name, x in (required | {name: x for name, x in optional.items() if x is not None}).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise ValueError(
                f"{name}: expected a dense tensor, got a nested one; pad it and give attn_mask the padding"
            )
        if x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got layout {x.layout}; call .to_dense()")
        if x.is_quantized:
            raise TypeError(
                f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}; call .dequantize()"
            )


def check_number(name: str, x: float | None, *, integer: bool = False) -> None:
    """Raise TypeError where the argument called ``name`` is no number."""
    kinds = (int, numbers.Integral, torch.SymInt) if integer else (float, numbers.Real, torch.SymFloat, torch.SymInt)
    if not isinstance(x, kinds):
        raise TypeError(f"{name}: expected {'an integer' if integer else 'a number'}, got {x!r} ({type(x).__name__})")
