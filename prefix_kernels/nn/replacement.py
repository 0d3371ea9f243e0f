"""Prefixes for any model that is built of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from prefix_kernels.nn.multihead_attention import PrefixMultiheadAttention

# On a PrefixMultiheadAttention that took a place: which of the weights were trainable before.
_TRAINABLE_BEFORE = "_trainable_before_replacement"
_Attention = TypeVar("_Attention", bound=nn.MultiheadAttention)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replace_multihead_attention(
    model: nn.Module, num_prefix_tokens: int, *, prefix_dtype: torch.dtype | None = None
) -> nn.Module:
    """Give every ``torch.nn.MultiheadAttention`` in ``model``, in place, a trainable prefix of its own.

    Each becomes a :class:`prefix_kernels.PrefixMultiheadAttention` that shares its weights, which are frozen; what is
    not attention stays as it is. So it goes with ``nn.Transformer`` and its layers (self- and cross-attention),
    torchvision's ``VisionTransformer``, ``open_clip`` and whatever else is built that way, in training and in
    evaluation: the fused path that torch's layers have for evaluation does not bypass a prefix. The state dict keeps
    its keys and gains ``prefix_key`` and ``prefix_value`` of each attention. A module used in several places is
    replaced by one, with one prefix.

    Args:
        model: the model.
        num_prefix_tokens: ``P``, the prefix length, at least 1.
        prefix_dtype: dtype of the prefixes, e.g. float32 in a bfloat16 model. Default: that of each attention.

    Returns:
        ``model``.

    Example::

        model = replace_multihead_attention(vit_b_16(weights="DEFAULT"), num_prefix_tokens=20)
        mark_only_prefix_as_trainable(model, also_train=("heads",))
        ...
        save_prefix(model, "task.safetensors")

    Raises:
        ValueError: there is none, ``model`` is one itself, one has a prefix already, or one has hooks, which would be
            lost.
        TypeError: one is of a subclass that computes something else, or is parametrised.

    Source: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021; Jia et al., Visual Prompt
    Tuning, 2022 (for images, in input space).
    """
    if num_prefix_tokens < 1:
        raise ValueError(f"num_prefix_tokens: expected at least 1, got {num_prefix_tokens}")
    found = _find(model, nn.MultiheadAttention)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    replacements: dict[nn.Module, PrefixMultiheadAttention] = {}
    try:
        for name, attention in found.items():
            replacements[attention] = _replacement(name, attention, num_prefix_tokens, prefix_dtype)
    except Exception:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise
    for replaced, replacement in replacements.items():
        before = {name: flags[parameter] for name, parameter in replaced.named_parameters()}
        setattr(replacement, _TRAINABLE_BEFORE, before)
    _exchange(model, replacements)
    return model


def restore_multihead_attention(model: nn.Module) -> nn.Module:
    """Undo :func:`replace_multihead_attention`, in place: no prefixes, and the weights as trainable as before.

    Every :class:`prefix_kernels.PrefixMultiheadAttention` in ``model`` becomes a ``torch.nn.MultiheadAttention`` that
    shares its weights.

    Returns:
        ``model``.

    Raises:
        ValueError: there is none, or ``model`` is one itself.
    """
    found = _find(model, PrefixMultiheadAttention)
    _exchange(model, {attention: _plain(attention) for attention in found.values()})
    return model


def _find(model: nn.Module, kind: type[_Attention]) -> dict[str, _Attention]:
    if isinstance(model, kind):
        raise ValueError(
            f"model: expected a module that contains attention, got a {type(model).__name__} itself; see "
            "PrefixMultiheadAttention.from_multihead_attention"
        )
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not found:
        raise ValueError(f"model: expected a {kind.__name__} in it, got {type(model).__name__} without any")
    return found


def _replacement(
    name: str, attention: nn.MultiheadAttention, num_prefix_tokens: int, prefix_dtype: torch.dtype | None
) -> PrefixMultiheadAttention:
    if any(getattr(attention, hooks) for hooks in _HOOKS):
        raise ValueError(f"{name}: expected an attention without hooks, which would be lost, got one with")
    try:
        return PrefixMultiheadAttention.from_multihead_attention(
            attention, num_prefix_tokens, prefix_dtype=prefix_dtype
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _plain(attention: PrefixMultiheadAttention) -> nn.MultiheadAttention:
    plain = nn.MultiheadAttention(
        attention.embed_dim,
        attention.num_heads,
        attention.dropout,
        attention.in_proj_bias is not None,
        attention.bias_k is not None,
        attention.add_zero_attn,
        attention.kdim,
        attention.vdim,
        attention.batch_first,
        device="meta",
    )
    for name, _ in list(plain.named_parameters(recurse=False)):
        setattr(plain, name, attention.get_parameter(name))
    plain.out_proj = attention.out_proj
    for name, flag in getattr(attention, _TRAINABLE_BEFORE, {}).items():
        plain.get_parameter(name).requires_grad_(flag)
    return plain.train(attention.training)


def _exchange(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
