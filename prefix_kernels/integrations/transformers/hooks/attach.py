"""The hooks that give a model's attentions their prefixes: registered together, and taken off together."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_kernels.integrations.transformers.attention.interface import implementation_name
from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.hooks.decoder_positions import register_decoder_shift
from prefix_kernels.integrations.transformers.hooks.positions import PositionShift, UnpackedHint, position_modules
from prefix_kernels.integrations.transformers.hooks.shared_layers import SharedLayerHook
from prefix_kernels.integrations.transformers.hooks.stack import StackHook, first_layer_hook
from prefix_kernels.integrations.transformers.runtime.call_prefixes import SITE_ATTRIBUTE
from prefix_kernels.integrations.transformers.runtime.selection import PrefixSource
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout


@dataclass(eq=False)
class PrefixHooks:
    """The changes that :func:`install_hooks` made to a model.

    Attributes:
        handles: the handles of the hooks.
        attn_implementation: the attention implementation from before.
    """

    handles: list[RemovableHandle]
    attn_implementation: str

    def remove(self, model: PreTrainedModel) -> None:
        """Undo it, on the model or on the copy of the model that this is a copy with."""
        for handle in self.handles:
            handle.remove()
        for module in model.modules():
            if hasattr(module, SITE_ATTRIBUTE):
                delattr(module, SITE_ATTRIBUTE)
        _set_implementation(model, self.attn_implementation)


def install_hooks(
    model: PreTrainedModel,
    layout: PrefixLayout,
    config: PrefixTuningConfig,
    source: PrefixSource,
) -> PrefixHooks:
    """Give every attention in ``layout`` its prefix whenever ``model`` runs, and move positions as ``config`` says."""
    _give_own_config(model)
    hooks = PrefixHooks([], model.config._attn_implementation)
    _set_implementation(model, implementation_name(config.attention))
    handles = hooks.handles
    handles += [stack.register_forward_pre_hook(UnpackedHint(stack), with_kwargs=True) for stack in layout.stacks]
    if config.position_offset == "peft" and model.config.is_encoder_decoder:
        handles += register_decoder_shift(layout, source)
    elif config.position_offset == "peft":
        for module in position_modules(model, layout.stacks):
            shift = PositionShift(module, source)
            handles.append(module.register_forward_pre_hook(shift, with_kwargs=True))
    for stack in layout.stacks:
        stack_hook = StackHook(stack, layout, config, source)
        handles.append(stack.register_forward_pre_hook(stack_hook, with_kwargs=True))
        handles.append(stack_hook.layers[0].register_forward_pre_hook(first_layer_hook, with_kwargs=True))
    for layer in {id(site.layer): site.layer for site in layout.sites if site.calls > 1}.values():
        handles.append(layer.register_forward_pre_hook(SharedLayerHook(layer, layout), with_kwargs=True))
    for index, site in enumerate(layout.sites):
        if not hasattr(site.module, SITE_ATTRIBUTE):
            setattr(site.module, SITE_ATTRIBUTE, index)
    return hooks


def _set_implementation(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    # The stacks of T5 have copies of its config, which Transformers before 5.23 leaves as they are.
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name


def _give_own_config(model: PreTrainedModel) -> None:
    """Replace, in all submodules, the model's config and those inside it by one copy."""
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
