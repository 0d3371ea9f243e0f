"""The key/value cache that a model is given, whatever this version of Transformers calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# The second is the older name, which newer versions still take: they prefer the first.
CACHE_NAMES = ("cache", "past_key_values")


def past_length(inputs: Mapping[str, Any]) -> int | Tensor:
    """Number of tokens in the cache among the named ``inputs``; 0 without one."""
    caches = [inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None]
    return caches[0].get_seq_length() if caches else 0
