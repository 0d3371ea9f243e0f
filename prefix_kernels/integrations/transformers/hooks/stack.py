"""The hooks around the layers of a prepared model: prefixes go in, and gradients find their way back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.runtime.call_prefixes import PREFIX_ARGUMENT, CallPrefixes
from prefix_kernels.integrations.transformers.runtime.packed_rows import PACKED_ARGUMENT, PackedRows
from prefix_kernels.integrations.transformers.runtime.relative_bias import (
    BankColumns,
    RelativeBias,
    StackBias,
    has_relative_bias,
)
from prefix_kernels.integrations.transformers.runtime.selection import (
    PREFIX_NAMES,
    PrefixSelection,
    PrefixSource,
    batch_size,
    find_selection,
)
from prefix_kernels.integrations.transformers.structure.key_shape import module_config
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.integrations.transformers.structure.support import refuse_attention_weights


class StackHook:
    """Forward pre-hook of a stack of layers: evaluates its prefixes once and hands them to the layers.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(
        self,
        stack: nn.Module,
        layout: PrefixLayout,
        config: PrefixTuningConfig,
        source: PrefixSource,
        implementation: str,
    ) -> None:
        self.source = source
        self.stack = stack
        self.implementation = implementation
        self.window_includes_prefix = config.window_includes_prefix
        self.counts_positions = config.position_offset == "peft"
        sites = [site for site in layout.sites if site.stack is stack]
        self.layers = list({id(site.layer): site.layer for site in sites}.values())
        self.attentions = list({id(site.module): site.module for site in sites}.values())
        self.relative_bias = RelativeBias(stack) if has_relative_bias(stack) else None

    def __call__(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for attention in self.attentions:
            implementation = module_config(attention)._attn_implementation
            if implementation != self.implementation:
                raise RuntimeError(
                    f"the model's attention implementation is {implementation!r}, which would ignore the prefix: "
                    f"expected {self.implementation!r} (remove_prefix(model) takes the prefix off)"
                )
        refuse_attention_weights("output_attentions", kwargs.get("output_attentions"))
        selection = find_selection(kwargs, self.source)
        kwargs.pop(PREFIX_NAMES, None)
        packed: PackedRows | None = kwargs.pop(PACKED_ARGUMENT, None)
        if packed is None and PREFIX_ARGUMENT in kwargs:
            packed = kwargs[PREFIX_ARGUMENT].packed  # of a model that share_prefixes had before its prefix
        recorded = self.source.context.recorded
        if recorded is not None:
            prefixes = CallPrefixes({}, recorded=recorded)
        elif selection is None:
            prefixes = CallPrefixes(self.source.pairs(stack), self.window_includes_prefix)
        else:
            sequences = batch_size(args, kwargs) if packed is None else packed.count
            bank, ids = selection.bank(stack), selection.ids_of(sequences)
            prefixes = CallPrefixes(bank.pairs, self.window_includes_prefix, ids, bank.lens)
        prefixes.counts_positions = self.counts_positions
        prefixes.packed = packed
        if self.relative_bias is not None:
            prefixes.bias = self._position_bias(self.relative_bias, prefixes, selection, args, kwargs)
        self._detach_for_reentrant_checkpointing(prefixes)
        return args, kwargs | {PREFIX_ARGUMENT: prefixes}

    def _position_bias(
        self,
        relative_bias: RelativeBias,
        prefixes: CallPrefixes,
        selection: PrefixSelection | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> StackBias:
        if prefixes.ids is None or selection is None:
            return relative_bias(self.source.shift, args, kwargs)
        if not selection.shifts_positions:
            return StackBias()
        columns = BankColumns(prefixes.ids, selection.bank_shifts)
        longest = max(key.shape[2] for key, _ in prefixes.pairs.values())
        return replace(relative_bias(columns.slots * longest, args, kwargs), columns=columns)

    def _detach_for_reentrant_checkpointing(self, prefixes: CallPrefixes) -> None:
        pairs = prefixes.pairs
        needs_grad = torch.is_grad_enabled() and any(key.requires_grad for key, _ in pairs.values())
        if needs_grad and any(is_checkpointed_reentrantly(layer) for layer in self.layers):
            # Reentrant checkpointing runs one backward pass per layer. Through the encoder's graph that would be as
            # many passes, the second of which fails: what the first needed has been freed.
            prefixes.detached_from = pairs
            prefixes.pairs = {
                site: (key.detach().requires_grad_(), value.detach().requires_grad_())
                for site, (key, value) in pairs.items()
            }


def is_checkpointed_reentrantly(layer: nn.Module) -> bool:
    """Return True if ``layer`` runs without gradients first, and again during the backward pass."""
    # torch's checkpoint_wrapper, around the layer or inside it.
    if any(getattr(getattr(m, "checkpoint_impl", None), "name", None) == "REENTRANT" for m in layer.modules()):
        return True
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return False
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    # torch's checkpoint is reentrant unless told otherwise.
    reentrant: bool = getattr(checkpoint, "keywords", {}).get("use_reentrant", True)
    return reentrant


def first_layer_hook(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the first layer: gives detached prefixes a way back to what they were detached from.

    The first layer's input is the last thing whose gradient a backward pass forms, when all layers' prefixes have
    theirs; see :class:`_CollectPrefixGradients`.
    """
    prefixes = kwargs.get(PREFIX_ARGUMENT)
    if prefixes is None or prefixes.detached_from is None:
        return None
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "reentrant activation checkpointing: this version of Transformers runs a layer's hooks inside the "
            "checkpoint, where the gradient of the prefix would be lost; use use_reentrant=False"
        )
    leaves = [tensor for pair in prefixes.pairs.values() for tensor in pair]
    sources = [tensor for pair in prefixes.detached_from.values() for tensor in pair]
    prefixes.detached_from = None
    if args:
        return (_CollectPrefixGradients.apply(args[0], leaves, *sources), *args[1:]), kwargs
    hidden_states = _CollectPrefixGradients.apply(kwargs["hidden_states"], leaves, *sources)
    return args, kwargs | {"hidden_states": hidden_states}


class _CollectPrefixGradients(torch.autograd.Function):
    """The identity on ``hidden_states``; its backward hands the gradients of ``leaves`` to ``sources``."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, leaves: list[Tensor], *sources: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return grad, None, *grads
