"""The hooks of a model whose prefix lies in its key/value cache, where the model's own attention sees it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache
from transformers.utils.generic import ModelOutput

from prefix_kernels.integrations.transformers.hooks.cached_masks import for_both_sides, with_prefix_columns
from prefix_kernels.integrations.transformers.hooks.positions import find_position_table
from prefix_kernels.integrations.transformers.hooks.stack import is_checkpointed_reentrantly
from prefix_kernels.integrations.transformers.runtime.prefix_cache import (
    RowPrefixes,
    has_prefix,
    rows_of_bank,
    shared_by_rows,
    with_prefix,
    without_prefix,
)
from prefix_kernels.integrations.transformers.runtime.selection import (
    PREFIX_NAMES,
    PrefixSelection,
    PrefixSource,
    find_selection,
)
from prefix_kernels.integrations.transformers.structure.attention_sites import is_cross
from prefix_kernels.integrations.transformers.structure.cached_attention import find_caching_stack
from prefix_kernels.integrations.transformers.structure.caches import CACHE_NAMES
from prefix_kernels.integrations.transformers.structure.key_shape import module_config
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.integrations.transformers.structure.source import masks_both_sides, reads_cache
from prefix_kernels.integrations.transformers.structure.windows import has_sliding_window

# An attribute of Transformers' layers: True lets them use a cache although their activations are checkpointed.
KEEPS_CACHE = "_can_checkpoint_with_cache"


class CachedStackHook:
    """Forward pre-hook of a stack that takes a cache: puts the prefixes of this call before what the cache holds.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, model: PreTrainedModel, layout: PrefixLayout, source: PrefixSource) -> None:
        self.source = source
        stack = find_caching_stack(model)
        self.cache_name, self.parameter_names = stack.cache_name, stack.parameter_names
        self.takes_positions = stack.takes_positions
        names = {module: name for name, module in model.named_modules()}
        self.sites = {site.cache_layer: index for index, site in enumerate(layout.sites)}
        self.names = {site.cache_layer: f"{type(model).__name__}: {names[site.module]}" for site in layout.sites}
        self.readable = [
            site.cache_layer for site in layout.sites if is_cross(names[site.module]) and reads_cache(site.module)
        ]
        self.layers = list({id(site.layer): site.layer for site in layout.sites}.values())
        self.both_sides = masks_both_sides(stack.module)
        self.has_window = has_sliding_window(model)
        self.has_encoder = bool(model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False))
        table = find_position_table(stack.module) or getattr(stack.module, "embed_positions", None)
        size = getattr(table, "num_embeddings", None)
        self.num_positions = None if size is None else size - getattr(table, "offset", 0)

    def __call__(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        given = [cache for name in CACHE_NAMES if (cache := kwargs.pop(name, None)) is not None]
        selection = find_selection(kwargs, self.source)
        kwargs.pop(PREFIX_NAMES, None)
        embeddings = kwargs.get("inputs_embeds")
        tokens: Tensor | None = kwargs.get("input_ids") if embeddings is None else embeddings
        if tokens is None:
            return (), kwargs  # the model says what is wrong
        batch, length = tokens.shape[:2]
        prefixes = self._prefixes(stack, selection, batch)
        cache = self._cache(stack, given[0] if given else None, kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        self._move_positions(kwargs, selection, tokens, past, prefixes.length)
        kwargs["attention_mask"] = self._mask(
            stack, kwargs.get("attention_mask"), cache, prefixes, batch, past + length
        )
        kwargs[self.cache_name] = with_prefix(
            cache,
            prefixes=prefixes,
            sites=self.sites,
            names=self.names,
            recorded=self.source.context.recorded,
            readable=dict.fromkeys(self.readable, next(stack.parameters()).dtype),
        )
        return (), kwargs

    def _mask(
        self, stack: nn.Module, mask: Any, cache: Cache | None, prefixes: RowPrefixes, batch: int, length: int | Tensor
    ) -> Tensor | None:
        """Return ``mask``, of a sequence of ``length`` tokens with those in ``cache``, with columns for the prefix.

        Raises:
            ValueError: it is a mask that was made for a cache in which the prefix has no place.
        """
        if self.both_sides and mask is None:
            mask = torch.ones(batch, int(length), dtype=torch.int64, device=next(stack.parameters()).device)
        if self.has_window and isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, 0].all():
            warnings.warn(
                "padding on the left of the sequence takes room in the sliding windows, because it lies between the "
                "prefix in the cache and the tokens (attention='cache'); pad on the right for exact results",
                stacklevel=3,
            )
        if self.has_window and isinstance(cache, StaticCache) and not (mask is None or getattr(mask, "ndim", 0) == 2):
            raise ValueError(
                "past_key_values: expected a cache that grows, because layers have sliding windows and the prefix lies "
                f"in the key/value cache (attention='cache'), got a {type(cache).__name__} with masks made for it"
            )
        if isinstance(mask, dict) and set(mask) == {"full_attention"}:
            mask = mask["full_attention"]  # a stack takes this as the mask of all its layers
        mask = with_prefix_columns(mask, prefixes, batch, int(length))
        return for_both_sides(mask, next(stack.parameters()).dtype) if self.both_sides else mask

    def _prefixes(self, stack: nn.Module, selection: PrefixSelection | None, batch: int) -> RowPrefixes:
        if self.source.context.recorded is not None:
            return RowPrefixes({}, 0)
        if selection is None:
            return shared_by_rows(self.source.pairs(stack), batch)
        return rows_of_bank(selection.bank(stack), selection.ids_of(batch))

    def _cache(self, stack: nn.Module, given: object, kwargs: dict[str, Any]) -> Cache | None:
        """Return the cache of this call without the prefix: the given one, or a new one where the model would make it.

        Raises:
            ValueError: the given one is no Cache.
            RuntimeError: activation checkpointing would lose the gradient of the prefix.
        """
        if given is not None and not isinstance(given, Cache):
            raise ValueError(f"{self.cache_name}: expected a transformers.Cache, got a {type(given).__name__}")
        has_encoder = self.has_encoder or kwargs.get("encoder_hidden_states") is not None
        checkpointed = [layer for layer in self.layers if getattr(layer, "gradient_checkpointing", False)]
        if stack.training and checkpointed:
            if has_encoder or any(is_checkpointed_reentrantly(layer) for layer in checkpointed):
                expected = "a model without an encoder" if has_encoder else "use_reentrant=False"
                raise RuntimeError(
                    f"gradient checkpointing: expected {expected}, because the prefix lies in the key/value cache "
                    "(attention='cache') and its gradient would be lost"
                )
            if given is not None:
                # Transformers says so of the layers that leave out a cache by themselves.
                warnings.warn(
                    f"{self.cache_name}: gradient checkpointing uses no cache, so the given one is left out",
                    stacklevel=3,
                )
            return None  # an entry would be kept twice, the second time during the backward pass
        config = module_config(stack)
        if has_encoder and not isinstance(given, EncoderDecoderCache):
            # A model would do this itself to a plain cache, and then hand out the prefix inside.
            own = DynamicCache(config=config) if given is None else given
            return EncoderDecoderCache(own, DynamicCache(config=config))
        use_cache = kwargs.get("use_cache")
        wanted = getattr(config, "use_cache", False) if use_cache is None else use_cache
        return DynamicCache(config=config) if given is None and wanted and not self.both_sides else given

    def _move_positions(
        self, kwargs: dict[str, Any], selection: PrefixSelection | None, tokens: Tensor, past: int | Tensor, length: int
    ) -> None:
        """Let the positions of each row begin behind its prefix, or with ``position_offset="none"`` at 0.

        Raises:
            ValueError: there are not so many, or rows would begin at different ones and the stack cannot be told.
        """
        count = tokens.shape[1]
        if selection is None:
            largest = self.source.shift
            shift: int | Tensor = largest
            is_length = shift == length
        else:
            shift, largest = selection.shifts_of(tokens.shape[0]), selection.largest_shift
            is_length = bool((shift == length).all())
        if self.num_positions is not None and int(past) + count > self.num_positions - largest:
            raise ValueError(
                f"input_ids: {int(past) + count} tokens do not fit: position_offset='peft' moves positions by "
                f"{largest}, which leaves {self.num_positions - largest} of the model's positions"
            )
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + shift
        elif self.takes_positions and not is_length:
            kwargs["position_ids"] = torch.arange(count, device=tokens.device)[None] + past + shift
        elif not is_length and self.num_positions is not None:
            raise ValueError(
                "prefix_names: expected prefixes of one length for all rows, because the model takes no position_ids "
                f"and its positions would begin at {length} for all, got rows that begin at "
                f"{sorted(set(torch.as_tensor(shift).flatten().tolist()))}"
            )


def hide_prefix(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the same stack: returns the cache without the prefix."""
    for cache in kwargs.values():
        if has_prefix(cache):
            plain = without_prefix(cache)
            if isinstance(output, ModelOutput):
                return type(output)(**{name: plain if value is cache else value for name, value in output.items()})
            # A model leaves out of a tuple what is None.
            values = (plain if value is cache else value for value in output)
            return tuple(value for value in values if value is not None)
    return output


def install_cached(model: PreTrainedModel, layout: PrefixLayout, source: PrefixSource) -> list[RemovableHandle]:
    """Give the attentions in ``layout`` their prefixes before what the cache of ``model`` holds."""
    (stack,) = layout.stacks
    hook = CachedStackHook(model, layout, source)
    for layer in hook.layers:
        if hasattr(layer, KEEPS_CACHE):
            setattr(layer, KEEPS_CACHE, True)
    return [
        stack.register_forward_pre_hook(hook, with_kwargs=True),
        stack.register_forward_hook(hide_prefix, with_kwargs=True),
    ]
