"""The oracle of a prefix in a model's cache: Transformers' own cache, filled with the prefix before the call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from prefix_kernels.integrations.transformers.structure.cached_attention import find_caching_stack


@contextmanager
def holding(model: PreTrainedModel, prefixes: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While it is open, calls of the plain ``model`` begin with a cache that holds ``prefixes``, as in PEFT.

    Args:
        prefixes: ``(prefix_key, prefix_value)`` ``[Hkv, P, D]`` by layer of the cache.
    """
    stack = find_caching_stack(model)

    def fill(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(stack.parameter_names, args, strict=False)) | kwargs
        tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        batch, length = tokens.shape[:2]
        cache = DynamicCache(config=module.config)
        for layer, pair in sorted(prefixes.items()):
            cache.update(*(states.expand(batch, -1, -1, -1) for states in pair), layer)
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.int64)
        kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, cache.get_seq_length()), mask], dim=1)
        both = model.config.is_encoder_decoder
        kwargs[stack.cache_name] = EncoderDecoderCache(cache, DynamicCache()) if both else cache
        return (), kwargs

    handle = stack.module.register_forward_pre_hook(fill, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
