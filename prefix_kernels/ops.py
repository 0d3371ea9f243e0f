"""Fake kernels, autocast and FLOP formulas of the operators of ``csrc/ops.cpp``; see :mod:`prefix_kernels.autograd`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

forward = torch.ops.prefix_kernels.forward
backward = torch.ops.prefix_kernels.backward

DIFFERENTIABLE = ("query", "key", "value", "prefix_key", "prefix_value")
TENSOR_OPTIONS = ("attn_mask", "prefix_ids", "prefix_lens", "query_offset", "dropout_seed")
NUM_OPTIONS = 13  # that both operators share, the tensors first

_Shape = Sequence[int]  # stands for a tensor in the arguments of a FLOP formula


def lse_dtype(query: Tensor) -> torch.dtype:
    """The dtype of the logsumexp of such queries."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def check_devices(query: Tensor, others: Iterable[tuple[str, Tensor | None]]) -> None:
    """Check that the tensors, given with their names, are on the device of ``query``.

    Raises:
        ValueError: one is not.
    """
    for name, x in others:
        if x is not None and x.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device} like query, got one on {x.device}")


@torch.library.register_fake("prefix_kernels::forward")
def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Shapes and dtypes are checked when the operator runs; a device would be settled by then.
    check_devices(query, zip((*DIFFERENTIABLE[1:], *TENSOR_OPTIONS), rest, strict=False))
    batch, heads, q_len, _ = query.shape
    value = rest[1]
    out = query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, heads, q_len, dtype=lse_dtype(query))
    mask = rest[len(DIFFERENTIABLE) - 1]
    is_added = mask is not None and mask.dtype != torch.bool
    return out, lse, torch.empty_like(lse) if is_added else lse.new_empty(0)


def empty_gradient(like: Tensor | None, head_dim: int) -> Tensor:
    """A gradient, not yet written, laid out as ``csrc/results.cpp`` does: as its input where the kernels can."""
    assert like is not None, "neither the tensor whose gradient is asked for nor one of its shape was kept"
    if like.shape[-1] != head_dim:
        return like.new_empty(*like.shape[:-1], head_dim)
    gradient = torch.empty_like(like)
    if like.numel() == 0 or (like.shape[-1] > 1 and gradient.stride(-1) != 1):
        gradient = torch.empty_like(like, memory_format=torch.contiguous_format)
    return gradient


@torch.library.register_fake("prefix_kernels::backward")
def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs: Sequence[bool] = rest[-1]
    likes = likes_of_gradients(query, key, value, prefix_key, prefix_value)
    head_dim, value_dim = query.shape[-1], dout.shape[-1]
    head_dims = (head_dim, head_dim, value_dim, head_dim, value_dim)
    return tuple(
        empty_gradient(like, dim) if need else query.new_empty(0)
        for like, dim, need in zip(likes, head_dims, needs, strict=True)
    )


def likes_of_gradients(
    query: Tensor, key: Tensor | None, value: Tensor | None, prefix_key: Tensor | None, prefix_value: Tensor | None
) -> list[Tensor | None]:
    """The tensors whose shapes the gradients have, but for the head dim: each input, or its twin where it was left."""
    return [
        query,
        _either(key, value),
        _either(value, key),
        _either(prefix_key, prefix_value),
        _either(prefix_value, prefix_key),
    ]


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a


def needed_for_backward(
    needs: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[tuple[Tensor | None, ...], bool]:
    """The inputs and results that the backward pass reads for the gradients asked for, None in place of others.

    Returns:
        Them, in the order given, and whether a gradient of ``lse`` enters.
    """
    dquery, dkey, dvalue, dprefix_key, dprefix_value = needs
    visits_sequence = dquery or dkey or dvalue
    visits_prefix = prefix_key is not None and (dquery or dprefix_key or dprefix_value)
    ds = dquery or dkey or dprefix_key
    kept = (
        query,
        key if visits_sequence else None,
        value if dquery or dkey else None,
        prefix_key if visits_prefix else None,
        prefix_value if visits_prefix and (dquery or dprefix_key) else None,
        out if ds else None,
        lse,
    )
    return kept, ds


def cast_as_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert ``x`` to the ``dtype`` of an autocast region, which leaves float64 as it is."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


_autocast_library = torch.library.Library("prefix_kernels", "IMPL")


def register_autocast(name: str) -> None:
    """Cast query, key and value as autocast does for attention; the prefix is read in its own dtype.

    Args:
        name: that of an operator of ``prefix_kernels`` whose first three arguments they are.
    """
    operator = getattr(torch.ops.prefix_kernels, name)
    for device_type, dispatch_key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register_autocast(name, operator, device_type, dispatch_key)


def _register_autocast(name: str, operator: Callable[..., Any], device_type: str, dispatch_key: str) -> None:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def with_autocast(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return operator(*(cast_as_autocast(x, dtype) for x in (query, key, value)), *rest)

    _autocast_library.impl(name, with_autocast, dispatch_key)


register_autocast("forward")


def _columns(key_len: int, prefix_key_shape: _Shape | None, prefix_ids_shape: _Shape | None) -> tuple[int, int]:
    """``(prefix, sequence)`` columns that each query is multiplied with; masks are not counted, as PyTorch does."""
    if prefix_key_shape is None:
        return 0, key_len
    slots = prefix_ids_shape[1] if prefix_ids_shape is not None and len(prefix_ids_shape) == 2 else 1
    return slots * prefix_key_shape[-2], key_len


@register_flop_formula(torch.ops.prefix_kernels.forward)
def forward_flops(
    query: _Shape,
    key: _Shape,
    value: _Shape,
    prefix_key: _Shape | None,
    prefix_value: _Shape | None,
    attn_mask: _Shape | None = None,
    prefix_ids: _Shape | None = None,
    *_: object,
    **__: object,
) -> int:
    """Floating-point operations of the forward pass, from the shapes of its tensors."""
    batch, heads, q_len, head_dim = query
    return 2 * batch * heads * q_len * (head_dim + value[3]) * sum(_columns(key[2], prefix_key, prefix_ids))


@register_flop_formula(torch.ops.prefix_kernels.backward)
def backward_flops(
    dout: _Shape,
    dlse: _Shape | None,
    query: _Shape,
    key: _Shape | None,
    value: _Shape | None,
    prefix_key: _Shape | None,
    prefix_value: _Shape | None,
    out: _Shape | None,
    lse: _Shape,
    attn_mask: _Shape | None = None,
    prefix_ids: _Shape | None = None,
    *rest: Any,
    **__: object,
) -> int:
    """Floating-point operations of the backward pass; the last of ``rest`` are ``key_len`` and ``needs``."""
    batch, heads, q_len, head_dim = query
    key_len: int
    needs: Sequence[bool]
    key_len, needs = rest[-2:]
    prefix_columns, sequence_columns = _columns(key_len, prefix_key, prefix_ids)
    queries = batch * heads * q_len
    return backward_flops_of_pairs(queries * prefix_columns, queries * sequence_columns, head_dim, dout[3], needs)


def backward_flops_of_pairs(prefix: int, sequence: int, head_dim: int, value_dim: int, needs: Sequence[bool]) -> int:
    """Floating-point operations of a backward pass over that many pairs of a query and a key."""
    dquery, dkey, dvalue, dprefix_key, dprefix_value = needs

    def products(key_gradient: bool, value_gradient: bool) -> int:
        ds = dquery or key_gradient
        of_head_dim = (ds or value_gradient) + dquery + key_gradient
        return of_head_dim * head_dim + (ds + value_gradient) * value_dim

    return 2 * (prefix * products(dprefix_key, dprefix_value) + sequence * products(dkey, dvalue))
