"""The way by which the attentions of a model get their prefixes: their attention function, or the model's cache."""

from __future__ import annotations

from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.structure.attention_sites import AttentionSite, find_sites
from prefix_kernels.integrations.transformers.structure.cached_attention import find_cached_sites
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.integrations.transformers.structure.support import refuse_fixed_attention

CACHE = "cache"


def prefix_sites(model: PreTrainedModel, attention: str = "prefix_kernels") -> list[AttentionSite]:
    """Return the attentions of ``model`` that can have a prefix.

    Args:
        attention: as in PrefixTuningConfig. ``"prefix_kernels"`` means the cache too where nothing else can serve.

    Raises:
        ValueError: neither the attention function nor the cache can give them one.
    """
    if _is_cached(model, attention):
        return find_cached_sites(model)
    refuse_fixed_attention(model)
    return find_sites(model)


def find_layout(model: PreTrainedModel, config: PrefixTuningConfig) -> PrefixLayout:
    """Return the attentions of ``model`` that get a prefix by ``config``, with its length in each.

    Raises:
        ValueError: the model has no such attentions.
    """
    return PrefixLayout(prefix_sites(model, config.attention), config)


def uses_cache(model: PreTrainedModel, config: PrefixTuningConfig) -> bool:
    """Return True if the prefixes of ``model`` lie in its key/value cache."""
    return _is_cached(model, config.attention)


def _is_cached(model: PreTrainedModel, attention: str) -> bool:
    return attention == CACHE or (attention == "prefix_kernels" and why_cache(model) is not None)


def why_cache(model: PreTrainedModel) -> str | None:
    """Return why the attention function of ``model`` cannot serve where its cache can; else None."""
    try:
        refuse_fixed_attention(model)
        find_sites(model)
    except ValueError as error:
        try:
            find_cached_sites(model)
        except ValueError:
            return None
        return str(error)
    return None
