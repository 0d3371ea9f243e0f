"""The attentions of a model that can be given a prefix as the first entries of its key/value cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.structure.attention_sites import (
    DECODER,
    SELF,
    AttentionSite,
    enclosing_layer,
    is_cross,
    language_model,
)
from prefix_kernels.integrations.transformers.structure.caches import CACHE_NAMES, layer_index
from prefix_kernels.integrations.transformers.structure.key_shape import module_config, read_key_shape
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.integrations.transformers.structure.source import reads_cache, updates_cache
from prefix_kernels.integrations.transformers.structure.windows import has_sliding_window

# Names of the decoder in an encoder-decoder model.
_DECODERS = ("decoder", "text_decoder")


@dataclass(frozen=True)
class CachingStack:
    """The module whose forward takes the key/value cache, makes the masks, and calls the layers.

    Attributes:
        module: the module.
        cache_name: its argument for the cache.
        parameter_names: all its arguments.
    """

    module: nn.Module
    cache_name: str
    parameter_names: list[str]

    @property
    def takes_positions(self) -> bool:
        """True if the forward takes ``position_ids``."""
        return "position_ids" in self.parameter_names


def find_caching_stack(model: PreTrainedModel) -> CachingStack:
    """Return the stack of ``model`` that takes a cache.

    Raises:
        ValueError: there is none.
    """
    module = language_model(model.base_model)
    while not _cache_names(module) or _calls_encoder(module):
        inner = next((part for name in _DECODERS if (part := getattr(module, name, None)) is not None), None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"{type(model).__name__} takes no key/value cache that could hold a prefix")
        module = inner
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if "attention_mask" not in names or not {"input_ids", "inputs_embeds"} & set(names):
        raise ValueError(
            f"{type(module).__name__}: expected a forward that takes input_ids or inputs_embeds and attention_mask "
            f"beside a key/value cache, got {names}"
        )
    return CachingStack(module, _cache_names(module)[0], names)


def shares_cache_with_images(model: PreTrainedModel) -> bool:
    """Return True if ``model`` has attentions to images that read its cache even where there is no image."""
    return any(is_cross(name) and reads_cache(module) for name, module in model.named_modules())


def find_cached_sites(model: PreTrainedModel, *, cross_attention: bool = False) -> list[AttentionSite]:
    """Return the self-attentions of ``model`` that add their keys and values to its cache, in order of its modules.

    Args:
        cross_attention: include the attentions to an image that share the cache, whose layers a prefix would fill too.

    Raises:
        ValueError: there are none, or the model has a state besides, which a prefix in the cache would not reach.
    """
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise ValueError(f"{name} has layers with another state than keys and values, which its cache holds too")
    stack = find_caching_stack(model).module
    role = DECODER if model.config.is_encoder_decoder else SELF
    sites: list[AttentionSite] = []
    for path, module in stack.named_modules():
        if not updates_cache(module) or layer_index(module) is None:
            continue
        if not is_cross(path) or (cross_attention and reads_cache(module)):
            _, layer = enclosing_layer(stack, path)
            layers = _layers_of_calls(stack, path, module)
            for call, number in enumerate(layers):
                shape = read_key_shape(module)
                sites.append(AttentionSite(module, layer, stack, role, 0, *shape, call, len(layers), number))
    if not sites:
        raise ValueError(f"{name}: found no attention that adds its keys to a key/value cache")
    if any(site.calls > 1 for site in sites):
        sites.sort(key=lambda site: site.cache_layer or 0)
    numbers = [site.cache_layer for site in sites]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}: expected attentions with a layer of the cache for each, got layers {numbers}")
    return [replace(site, depth=depth) for depth, site in enumerate(sites)]


def _layers_of_calls(stack: nn.Module, path: str, module: nn.Module) -> list[int]:
    """Return the numbers of the cache's layers that the attention ``module`` uses, one for each call of it."""
    first = layer_index(module)
    assert first is not None
    config = module_config(stack)
    if config.model_type != "hrm_text":
        return [first]
    # Each of its cycles calls the low stack so many times, then the high stack once; every call has layers of its own.
    calls, size = config.L_cycles + 1, config.num_layers_per_stack
    in_cycle = [config.L_cycles] if path.startswith("H_module") else range(config.L_cycles)
    return [(cycle * calls + call) * size + first for cycle in range(config.H_cycles) for call in in_cycle]


def refuse_uncachable(model: PreTrainedModel, layout: PrefixLayout, config: PrefixTuningConfig) -> None:
    """Raise where ``config`` asks for a prefix that the cache of ``model`` cannot hold.

    Raises:
        ValueError: the message names the setting.
    """
    why = f"because the prefix of {type(model).__name__} lies in its key/value cache (attention='cache')"
    if len(set(config.prefix_lengths())) > 1:
        raise ValueError(f"num_virtual_tokens: expected one length, {why}, got {config.num_virtual_tokens}")
    if len(layout.sites) < len(find_cached_sites(model)):
        raise ValueError(f"layers: expected all layers, {why}, got {config.layers}")
    if not config.window_includes_prefix and has_sliding_window(model):
        raise ValueError(f"window_includes_prefix: expected True, {why} and slides out of its windows, got False")
    stack = find_caching_stack(model)
    if config.position_offset != "peft" and not stack.takes_positions:
        raise ValueError(
            f"position_offset: expected 'peft', {why} and {type(stack.module).__name__} takes no position_ids, got "
            f"{config.position_offset!r}"
        )


def _calls_encoder(module: nn.Module) -> bool:
    """Return True if ``module`` is an encoder-decoder model, whose ``attention_mask`` is that of the encoder."""
    return "encoder_outputs" in inspect.signature(module.forward).parameters


def _cache_names(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters
    return [name for name in CACHE_NAMES if name in parameters]
