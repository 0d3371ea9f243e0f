"""The attentions of a model that can be given a prefix as the first entries of its key/value cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

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
from prefix_kernels.integrations.transformers.structure.caches import CACHE_NAMES
from prefix_kernels.integrations.transformers.structure.key_shape import read_key_shape
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.integrations.transformers.structure.source import updates_cache
from prefix_kernels.integrations.transformers.structure.support import REFUSED_TYPES
from prefix_kernels.integrations.transformers.structure.windows import has_sliding_window

# Model types whose cache can hold no prefix.
UNCACHABLE_TYPES = ("hrm_text",)

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


def find_cached_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """Return the self-attentions of ``model`` that add their keys and values to its cache, in order of its modules.

    Raises:
        ValueError: there are none, or the model has a state besides, which a prefix in the cache would not reach.
    """
    name = type(model).__name__
    if model.config.model_type in UNCACHABLE_TYPES:
        raise ValueError(f"{name} is not supported: {REFUSED_TYPES[model.config.model_type]}")
    if getattr(model, "_is_stateful", False):
        raise ValueError(f"{name} has layers with another state than keys and values, which its cache holds too")
    stack = find_caching_stack(model).module
    role = DECODER if model.config.is_encoder_decoder else SELF
    sites: list[AttentionSite] = []
    for path, module in stack.named_modules():
        if updates_cache(module) and layer_index(module) is not None and not is_cross(path):
            _, layer = enclosing_layer(stack, path)
            shape = read_key_shape(module)
            sites.append(AttentionSite(module, layer, stack, role, len(sites), *shape))
    if not sites:
        raise ValueError(f"{name}: found no attention that adds its keys to a key/value cache")
    indices = [layer_index(site.module) for site in sites]
    if len(set(indices)) < len(indices):
        raise ValueError(f"{name}: expected attentions with a layer of the cache for each, got layers {indices}")
    return sites


def layer_index(module: nn.Module) -> int | None:
    """Return the number of the cache's layer that the attention ``module`` uses, or None if it has none."""
    indices = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
    return next((index for index in indices if isinstance(index, int)), None)


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
