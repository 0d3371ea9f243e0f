"""The key/value cache that a model is given, whatever this version of Transformers calls it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

# The second is the older name, which newer versions still take: they prefer the first.
CACHE_NAMES = ("cache", "past_key_values")


def cache_layer(module: nn.Module, others: Iterable[nn.Module]) -> int | None:
    """Return the number of the cache's layer that has the keys of the attention ``module``; None: it names none.

    Args:
        others: the attentions of the same model, from one of which ``module`` may take its keys.
    """
    if getattr(module, "is_kv_shared_layer", False):
        given = getattr(module, "kv_shared_layer_index", None)  # Transformers 5.18 has it, 5.23 has not
        stored = [layer_index(other) for other in others if _stores_keys_for(other, module)]
        return given if isinstance(given, int) else next(iter(stored), None)
    return layer_index(module)


def layer_index(module: nn.Module) -> int | None:
    """Return the number that the attention ``module`` gives the cache with its keys, or None if it has none."""
    indices = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
    return next((index for index in indices if isinstance(index, int)), None)


def _stores_keys_for(module: nn.Module, later: nn.Module) -> bool:
    return bool(getattr(module, "store_full_length_kv", False)) and module.layer_type == later.layer_type


def past_length(inputs: Mapping[str, Any]) -> int | Tensor:
    """Number of tokens in the cache among the named ``inputs``; 0 without one."""
    caches = [inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None]
    return caches[0].get_seq_length() if caches else 0
