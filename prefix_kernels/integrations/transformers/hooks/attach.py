"""The hooks that give a model's attentions their prefixes: registered together, and taken off together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_kernels.integrations.transformers.attention.interface import implementation_name
from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.hooks.cached_stack import KEEPS_CACHE, install_cached
from prefix_kernels.integrations.transformers.hooks.decoder_positions import register_decoder_shift
from prefix_kernels.integrations.transformers.hooks.packed import PackedSequences, takes_packed_rows
from prefix_kernels.integrations.transformers.hooks.positions import PositionShift, UnpackedHint, position_modules
from prefix_kernels.integrations.transformers.hooks.relay import register_relay
from prefix_kernels.integrations.transformers.hooks.shared_layers import SharedLayerHook
from prefix_kernels.integrations.transformers.hooks.stack import StackHook, first_layer_hook
from prefix_kernels.integrations.transformers.runtime.call_prefixes import RELAY_ATTRIBUTE, SITE_ATTRIBUTE
from prefix_kernels.integrations.transformers.runtime.relative_bias import has_relative_bias
from prefix_kernels.integrations.transformers.runtime.selection import PrefixSource
from prefix_kernels.integrations.transformers.structure.attention_sites import (
    CROSS,
    DECODER,
    ENCODER,
    VISION,
    find_sites,
)
from prefix_kernels.integrations.transformers.structure.cached_attention import refuse_uncachable
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.integrations.transformers.structure.routes import CACHE, uses_cache, why_cache
from prefix_kernels.integrations.transformers.structure.source import (
    hands_on_keywords,
    hands_over_window,
    is_told_a_smaller_window,
    makes_causal_windows,
    relies_on_causal_mask,
)
from prefix_kernels.integrations.transformers.structure.support import refuse_attention_weights
from prefix_kernels.integrations.transformers.structure.windows import (
    WINDOW_ATTRIBUTE,
    has_sliding_window,
    window_of_masks,
)


@dataclass(eq=False)
class PrefixHooks:
    """The changes that :func:`install_hooks` made to a model.

    Attributes:
        handles: the handles of the hooks.
        attn_implementation: the attention implementation from before; None: the hooks left it as it was.
    """

    handles: list[RemovableHandle]
    attn_implementation: str | None

    def remove(self, model: PreTrainedModel) -> None:
        """Undo :func:`install_hooks` on ``model``: the prepared model, or the deep copy that this was copied with."""
        for handle in self.handles:
            handle.remove()
        for module in model.modules():
            for name in (SITE_ATTRIBUTE, RELAY_ATTRIBUTE, WINDOW_ATTRIBUTE, KEEPS_CACHE):
                if name in vars(module):
                    delattr(module, name)
        if self.attn_implementation is not None:
            set_implementation(model, self.attn_implementation)


def install_hooks(
    model: PreTrainedModel,
    layout: PrefixLayout,
    config: PrefixTuningConfig,
    source: PrefixSource,
) -> PrefixHooks:
    """Give every attention in ``layout`` its prefix whenever ``model`` runs, and move positions as ``config`` says."""
    if uses_cache(model, config):
        # The warning first: it says why, should a setting be refused.
        if config.attention != CACHE:
            warnings.warn(
                f"{why_cache(model)}. So the prefix lies in the key/value cache (attention='cache'), where the model's "
                "own attention reads it. Results are right, but every layer concatenates it in every call, as in PEFT",
                stacklevel=4,
            )
        refuse_uncachable(model, layout, config)
        return PrefixHooks(install_cached(model, layout, source), None)
    refuse_attention_weights("model.config.output_attentions", model.config.output_attentions)
    give_own_config(model)
    hooks = PrefixHooks([], model.config._attn_implementation)
    dense_masks = needs_dense_masks(model, config)
    implementation = implementation_name(config.attention, dense_masks=dense_masks)
    set_implementation(model, implementation)
    handles = hooks.handles
    handles += [stack.register_forward_pre_hook(UnpackedHint(stack), with_kwargs=True) for stack in layout.stacks]
    sites, knows_rules = find_sites(model), config.attention == "prefix_kernels" and not dense_masks
    packable = [stack for stack in layout.stacks if knows_rules and takes_packed_rows(stack, sites)]
    owners = position_modules(model, packable)
    for stack in packable:
        packed_sequences = PackedSequences(stack, owners.get(stack))
        handles.append(stack.register_forward_pre_hook(packed_sequences, with_kwargs=True))
    if config.position_offset == "peft":
        handles += _move_positions(model, layout, source, packable)
    for stack in layout.stacks:
        stack_hook = StackHook(stack, layout, config, source, implementation)
        handles.append(stack.register_forward_pre_hook(stack_hook, with_kwargs=True))
        handles.append(stack_hook.layers[0].register_forward_pre_hook(first_layer_hook, with_kwargs=True))
    for layer in {id(site.layer): site.layer for site in layout.sites if site.calls > 1}.values():
        handles.append(layer.register_forward_pre_hook(SharedLayerHook(layer, layout), with_kwargs=True))
    for layer, attention in dict.fromkeys((site.layer, site.module) for site in layout.sites):
        if not hands_on_keywords(layer, attention):
            handles.append(register_relay(layer, attention))
    for site in sites:
        if (window := window_of_masks(site.module, site.stack)) is not None:
            setattr(site.module, WINDOW_ATTRIBUTE, window)
    for index, site in enumerate(layout.sites):
        if not hasattr(site.module, SITE_ATTRIBUTE):
            setattr(site.module, SITE_ATTRIBUTE, index)
    return hooks


def _move_positions(
    model: PreTrainedModel, layout: PrefixLayout, source: PrefixSource, packable: Sequence[nn.Module]
) -> list[RemovableHandle]:
    """Let sequences begin behind their prefix, in the stacks that number the positions of tokens.

    Args:
        packable: the stacks that take packed sequences.
    """
    if model.config.is_encoder_decoder:
        decoders = {site.stack: None for site in layout.sites if site.role == DECODER}
        return register_decoder_shift(decoders, source)
    owners = position_modules(model, layout.stacks)
    handles = []
    for module in dict.fromkeys(owners.values()):
        may_be_packed = any(stack in packable for stack, owner in owners.items() if owner is module)
        shift = PositionShift(module, source, may_be_packed)
        handles.append(module.register_forward_pre_hook(shift, with_kwargs=True))
    others = [stack for stack in layout.stacks if stack not in owners]
    handles += register_decoder_shift(others, source)
    unmoved = [s for s in others if getattr(s, "embed_positions", None) is None and not has_relative_bias(s)]
    if unmoved and model.main_input_name == "input_ids" and not owners:
        warnings.warn(
            f"{type(model).__name__} takes no position_ids, so its sequence keeps its own positions: what it computes "
            "is that of position_offset='none'",
            stacklevel=4,
        )
    return handles


def needs_dense_masks(model: PreTrainedModel, config: PrefixTuningConfig) -> bool:
    """Return True if masks have to say everything, because some attention is not told causality or its window."""
    # Attentions without a prefix go through the same function.
    sites = find_sites(model)
    unknowing = [
        site
        for site in sites
        if not hands_over_window(site.module) and window_of_masks(site.module, site.stack) is None
    ]
    sliding = [site for site in unknowing if makes_causal_windows(site.stack)]
    if sliding and config.window_includes_prefix and has_sliding_window(model):
        raise ValueError(
            f"window_includes_prefix: expected False, because {type(sliding[0].module).__name__} does not say how "
            "large its window is, got True"
        )
    decodes = getattr(model.config, "is_decoder", False)
    return bool(unknowing) or any(
        is_told_a_smaller_window(site.module, site.stack)
        or (site.role != ENCODER and relies_on_causal_mask(site.module, site.stack, decodes or site.role == DECODER))
        for site in sites
        if site.role not in (CROSS, VISION)
    )


def set_implementation(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    # The stacks of T5 have copies of its config, which Transformers before 5.23 leaves as they are.
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name


def give_own_config(model: PreTrainedModel) -> None:
    """Replace, in all submodules, the model's config and those inside it by one copy."""
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
