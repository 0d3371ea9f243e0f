"""The backend ``"split"``: PyTorch's kernel attends to the sequence, the kernels of this package to the prefix.

Forward: the sequence's result and logsumexp, to which ``extend_`` adds the prefix; a long prefix that all rows share is
one more call of PyTorch's kernel, with the rows of the batch as queries of one row, and both results are merged.
Backward: with the merged result and logsumexp the gradients of each part are exact by themselves, and those of the
query add up.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from prefix_kernels import autograd, ops
from prefix_kernels.backends.libraries import Library, library_for
from prefix_kernels.merge import merge_attention

log = logging.getLogger("prefix_kernels.backends")

# The least length of a prefix of all rows at which PyTorch's kernel attends to it too: an estimate, not
# measured.
FOLDED_PREFIX_LEN = 512

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? prefix_ids, "
    "Tensor? prefix_lens, bool is_causal, float? scale"
)
_GRADIENT_ARGUMENTS = (
    "Tensor dout, Tensor? dlse, Tensor query, Tensor? key, Tensor? value, Tensor? prefix_key, Tensor? prefix_value, "
    "Tensor? out, Tensor lse, Tensor? prefix_ids, Tensor? prefix_lens, bool is_causal, float? scale, SymInt key_len, "
    "bool[5] needs"
)
_library = torch.library.Library("prefix_kernels", "FRAGMENT")
_library.define(f"split_forward({_ARGUMENTS}, bool required) -> (Tensor out, Tensor lse)")
_library.define(
    f"split_backward({_GRADIENT_ARGUMENTS}) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dprefix_key, "
    "Tensor dprefix_value)"
)
extend_ = torch.ops.prefix_kernels.extend_
forward = torch.ops.prefix_kernels.split_forward
backward = torch.ops.prefix_kernels.split_backward


def _fused_options(
    prefix_ids: Tensor | None, prefix_lens: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Any, ...]:
    """The options of such a call in the order of ``prefix_kernels::forward``."""
    return (None, prefix_ids, prefix_lens, None, None, 0.0, is_causal, scale, None, -1, -1, False, 0.0)


def is_folded(query: Tensor, prefix_key: Tensor | None, prefix_ids: Tensor | None, prefix_lens: Tensor | None) -> bool:
    """Tell if PyTorch's kernel attends to the prefix: a long one of all rows, with queries that fold in place."""
    return (
        prefix_key is not None
        and prefix_key.dim() == 3
        and prefix_ids is None
        and prefix_lens is None
        and prefix_key.shape[1] >= FOLDED_PREFIX_LEN
        and (query.shape[0] == 1 or query.stride(0) == query.shape[2] * query.stride(2))
    )


def _folded(rows: Tensor) -> Tensor:
    """``[B, H, S, D]`` as ``[1, H, B * S, D]``, in place if the memory is ``[B, S, H, D]``."""
    return rows.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def _unfolded(rows: Tensor, batch: int) -> Tensor:
    """``[1, H, B * S, ...]`` as ``[B, H, S, ...]``."""
    unfolded: Tensor = rows.squeeze(0).unflatten(1, (batch, -1))
    return unfolded.transpose(0, 1)


def _in_our_layout(out: Tensor) -> Tensor:
    """``out`` as ``[B, Sq, Hq, D]`` in memory, whatever the library's layout is."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _laid_out_like(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in the memory layout of its input, which the operator's fake kernel promises."""
    strides = zip(gradient.shape, gradient.stride(), like.stride(), strict=True)
    if all(size == 1 or a == b for size, a, b in strides):
        return gradient
    copy = ops.empty_gradient(like, like.shape[-1])
    copy.copy_(gradient)
    return copy


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    prefix_ids: Tensor | None,
    prefix_lens: Tensor | None,
    is_causal: bool,
    scale: float | None,
    required: bool,
) -> tuple[Tensor, Tensor]:
    options = _fused_options(prefix_ids, prefix_lens, is_causal, scale)
    torch.ops.prefix_kernels.check(query, key, value, prefix_key, prefix_value, *options)
    library = library_for(query, key, value, is_causal, scale)
    if isinstance(library, str):
        if required:
            raise ValueError(f"backend: 'split' cannot serve this call: {library}")
        log.debug("prefix_attention: fused after all: %s", library)
        out, lse, _ = ops.forward(query, key, value, prefix_key, prefix_value, *options)
        return out, lse
    out, lse = library.forward(query, key, value, is_causal, scale)
    if prefix_key is None or prefix_value is None:
        return _in_our_layout(out), lse.contiguous()
    if is_folded(query, prefix_key, prefix_ids, prefix_lens):
        keys, values = (x.to(query.dtype).unsqueeze(0) for x in (prefix_key, prefix_value))
        prefix_out, prefix_lse = library.forward(_folded(query), keys, values, False, scale)
        batch = query.shape[0]
        out, lse = merge_attention([out, _unfolded(prefix_out, batch)], [lse, _unfolded(prefix_lse, batch)])
        return _in_our_layout(out), lse.contiguous()
    out, lse = _in_our_layout(out), lse.contiguous()
    extend_(query, out, lse, prefix_key, prefix_value, prefix_ids, prefix_lens, scale)
    return out, lse


def _folded_gradients(
    library: Library,
    dout: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (x.to(query.dtype).unsqueeze(0) for x in (prefix_key, prefix_value))
    folded_lse = _folded(lse.unsqueeze(-1)).squeeze(-1).contiguous()
    dquery, dkeys, dvalues = library.backward(
        _folded(dout), _folded(query), keys, values, _folded(out), folded_lse, False, scale
    )
    return _unfolded(dquery, query.shape[0]), dkeys[0].to(prefix_key.dtype), dvalues[0].to(prefix_value.dtype)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    prefix_ids: Tensor | None,
    prefix_lens: Tensor | None,
    is_causal: bool,
    scale: float | None,
    key_len: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    options = _fused_options(prefix_ids, prefix_lens, is_causal, scale)
    dquery, dkey, dvalue, dprefix_key, dprefix_value = needs
    library: Library | str = "not asked for"
    # The kernels of the libraries know no gradient of lse, and are not all deterministic.
    by_library = (dquery or dkey or dvalue) and dlse is None and not torch.are_deterministic_algorithms_enabled()
    if by_library and key is not None and value is not None and out is not None:
        library = library_for(query, key, value, is_causal, scale)
    if isinstance(library, str) or key is None or value is None or out is None:
        gradients: tuple[Tensor, ...] = ops.backward(
            *(dout, dlse, query, key, value, prefix_key, prefix_value, out, lse, *options, key_len, needs)
        )
        return gradients
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # that of a sum has stride 0
    results = list(library.backward(dout, query, key, value, out, lse, is_causal, scale))
    prefix: Sequence[Tensor] = (query.new_empty(0), query.new_empty(0))
    if prefix_key is not None and prefix_value is not None and (dquery or dprefix_key or dprefix_value):
        if is_folded(query, prefix_key, prefix_ids, prefix_lens):
            from_prefix, *prefix = _folded_gradients(library, dout, query, prefix_key, prefix_value, out, lse, scale)
        else:
            empty = key[:, :, :0], value[:, :, :0]
            asked = [dquery, False, False, dprefix_key, dprefix_value]
            from_prefix, _, _, *prefix = ops.backward(
                *(dout, None, query, *empty, prefix_key, prefix_value, out, lse, *options, 0, asked)
            )
        if dquery:
            results[0] = results[0].add_(from_prefix)
    laid_out = (_laid_out_like(x, like) for x, like in zip(results, (query, key, value), strict=True))
    return tuple(x if need else query.new_empty(0) for x, need in zip((*laid_out, *prefix), needs, strict=True))


for _device in ("CPU", "CUDA"):
    _library.impl("split_forward", _forward, _device)
    _library.impl("split_backward", _backward, _device)


@torch.library.register_fake("prefix_kernels::split_forward")
def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    out, lse, _ = ops.forward(
        query, key, value, prefix_key, prefix_value, *_fused_options(rest[0], rest[1], rest[2], rest[3])
    )
    return out, lse


@torch.library.register_fake("prefix_kernels::split_backward")
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, prefix_ids, prefix_lens, is_causal, scale, key_len, needs = arguments
    options = _fused_options(prefix_ids, prefix_lens, is_causal, scale)
    gradients: tuple[Tensor, ...] = ops.backward(*tensors, *options, key_len, needs)
    return gradients


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, prefix_key, prefix_value, prefix_ids, prefix_lens, is_causal, scale, _ = inputs
    out, lse = output
    needs = list(ctx.needs_input_grad[: len(ops.DIFFERENTIABLE)])
    dquery, dkey, dvalue, dprefix_key, dprefix_value = needs
    visits_sequence = dquery or dkey or dvalue
    visits_prefix = prefix_key is not None and (dquery or dprefix_key or dprefix_value)
    ctx.save_for_backward(
        query,
        key if visits_sequence else None,
        value if visits_sequence else None,
        prefix_key if visits_prefix else None,
        prefix_value if visits_prefix else None,
        out if visits_sequence or dprefix_key else None,
        lse,
        prefix_ids,
        prefix_lens,
    )
    ctx.options = is_causal, scale, key.shape[2], needs
    ctx.uses_dlse = dquery or dkey or dprefix_key
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, prefix_key, prefix_value, out, lse, prefix_ids, prefix_lens = ctx.saved_tensors
    needs = ctx.options[-1]
    rest: list[Tensor | None] = [None] * 5
    if dout is None and dlse is None:
        return (None,) * len(needs) + tuple(rest)
    dout = torch.zeros_like(query) if dout is None else dout
    dlse = dlse if ctx.uses_dlse else None
    tensors = (query, key, value, prefix_key, prefix_value, out, lse, prefix_ids, prefix_lens)
    computed = backward(dout, dlse, *tensors, *ctx.options)
    return (*(x if need else None for x, need in zip(computed, needs, strict=True)), *rest)


torch.library.register_autograd("prefix_kernels::split_forward", _gradients, setup_context=_save_for_backward)
torch.library.register_autograd("prefix_kernels::split_backward", autograd.refuse_double_backward)
ops.register_autocast("split_forward")


@register_flop_formula(torch.ops.prefix_kernels.split_forward)
def _forward_flops(*shapes: Any, **_: object) -> int:
    query, key, value, prefix_key, prefix_value, prefix_ids, *_rest = shapes
    flops: int = ops.forward_flops(query, key, value, prefix_key, prefix_value, None, prefix_ids)
    return flops


@register_flop_formula(torch.ops.prefix_kernels.split_backward)
def _backward_flops(*shapes: Any, **_: object) -> int:
    *tensors, prefix_ids, _prefix_lens, _is_causal, _scale, key_len, needs = shapes
    flops: int = ops.backward_flops(*tensors, None, prefix_ids, key_len, needs)
    return flops
