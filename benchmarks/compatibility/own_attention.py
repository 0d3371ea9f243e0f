"""Two oracles for a model with a prefix, both by the model's own attention: ``torch.cat``, and the model's cache."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "own_attention_with_a_prefix"
Pairs = Sequence[tuple[Tensor, Tensor]]


@contextmanager
def concatenated(model: PreTrainedModel, prefixes: Mapping[nn.Module, Pairs]) -> Iterator[None]:
    """While it is open, the eager attention of the plain ``model`` gets its prefixes by ``torch.cat``.

    Args:
        prefixes: by attention module, the ``(prefix_key, prefix_value)`` ``[Hkv, P, D]`` of its first, second, ... call
            in a forward pass.
    """
    calls: Counter[nn.Module] = Counter()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if pairs := prefixes.get(module):
            prefix_key, prefix_value = (x.expand(key.shape[0], -1, -1, -1) for x in pairs[calls[module] % len(pairs)])
            calls[module] += 1
            key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
            length = prefix_key.shape[2]
            attention_mask = None if attention_mask is None else F.pad(attention_mask, (length, 0))
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = F.pad(kwargs["position_bias"], (length, 0))
        if kwargs.get("scaling") is None:
            kwargs["scaling"] = query.shape[-1] ** -0.5  # the default of attention functions
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def with_cache(model: PreTrainedModel, prefixes: Mapping[nn.Module, Pairs], inputs: Mapping[str, Tensor]) -> Any:
    """Call the plain decoder ``model`` with a cache of its own that holds the prefixes, as PEFT does.

    Args:
        inputs: ``input_ids`` and ``attention_mask`` ``[B, S]``; positions begin at ``P``.
    """
    model.set_attn_implementation("eager")
    mask, cache = inputs["attention_mask"], DynamicCache(config=model.config)
    batch, length = mask.shape
    for module, ((key, value),) in prefixes.items():
        cache.update(*(x.expand(batch, -1, -1, -1) for x in (key, value)), module.layer_idx)
    prefix_len = cache.get_seq_length()
    parameters = inspect.signature(model.base_model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=torch.cat([mask.new_ones(batch, prefix_len), mask], dim=1),
        position_ids=torch.arange(length)[None] + prefix_len,
        **{name: cache},
    )
