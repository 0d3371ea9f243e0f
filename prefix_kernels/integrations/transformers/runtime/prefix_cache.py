"""A key/value cache before whose entries lies a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from prefix_kernels.integrations.transformers.runtime.bank import PrefixBank
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixPair


@dataclass(frozen=True, eq=False)
class RowPrefixes:
    """The prefixes of the rows of a batch, of which the shorter ones begin later.

    Attributes:
        pairs: ``[B, Hkv, P, D]`` and ``[B, Hkv, P, Dv]`` of each attention, by its index among the sites.
        length: ``P``, that of the longest.
        visible: bool ``[B, P]``, False where a row has no prefix yet; None: every row has all of it.
    """

    pairs: Mapping[int, PrefixPair]
    length: int
    visible: Tensor | None = None


def shared_by_rows(pairs: Mapping[int, PrefixPair], batch: int) -> RowPrefixes:
    """Give all rows of a batch the same prefix ``[Hkv, P, D]``; without ``pairs``, none."""
    rows = {
        site: (key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)) for site, (key, value) in pairs.items()
    }
    return RowPrefixes(rows, next((key.shape[2] for key, _ in rows.values()), 0))


def rows_of_bank(bank: PrefixBank, ids: Tensor) -> RowPrefixes:
    """Give each row the prefixes of ``bank`` that ``ids`` ``[B]`` or ``[B, M]`` names, one after another; -1: none."""
    ids = ids.reshape(ids.shape[0], -1)
    lens = next(iter(bank.lens.values()))
    longest = next(iter(bank.pairs.values()))[0].shape[2]
    ends = torch.where(ids >= 0, lens[ids.clamp(min=0)], 0).cumsum(1)
    totals = ends[:, -1:]
    length = int(totals.max())
    places = torch.arange(length, device=ids.device) - (length - totals)
    visible = places >= 0
    places = places.clamp(min=0)
    slots = torch.searchsorted(ends, places, right=True).clamp(max=ids.shape[1] - 1)
    begins = torch.where(slots > 0, ends.gather(1, (slots - 1).clamp(min=0)), 0)
    entries = ids.gather(1, slots).clamp(min=0) * longest + places - begins
    entries = entries.where(visible, 0)

    def gathered(states: Tensor) -> Tensor:
        # [N, Hkv, P, D] to [B, Hkv, length, D]
        return states.transpose(1, 2).flatten(0, 1)[entries].transpose(1, 2)

    pairs = {site: (gathered(key), gathered(value)) for site, (key, value) in bank.pairs.items()}
    return RowPrefixes(pairs, length, None if bool(visible.all()) else visible)


@dataclass(frozen=True, eq=False)
class _ReadableLayer:
    """A layer of a cache whose entries, those of the prefix first, are read without adding any."""

    keys: Tensor
    values: Tensor
    is_initialized: bool = True


class PrefixCache(Cache):
    """A cache of which a model sees the prefix and then what ``inner`` holds, which never has the prefix itself.

    Args:
        inner: the cache that keeps keys and values; None: they are used once and not kept, so that a layer can run
            again during the backward pass.
        prefixes: of the rows.
        sites: the indices of the attentions among the sites, by the number of their layer in the cache.
        names: the names of the attentions in error messages, likewise.
        recorded: gets the keys and values ``[B, Hkv, Sk, D]`` by site; None: they are not asked for.
        readable: the dtypes of what a model may read in layers without adding entries, by the layers' numbers.
    """

    def __init__(
        self,
        inner: Cache | None,
        prefixes: RowPrefixes,
        sites: Mapping[int, int],
        names: Mapping[int, str],
        recorded: dict[int, PrefixPair] | None = None,
        readable: Mapping[int, torch.dtype] | None = None,
    ) -> None:
        self.inner = inner
        self.prefixes = prefixes
        self.sites = sites
        self.names = names
        self.recorded = recorded
        self.readable = {} if readable is None else readable

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """The layers of ``inner``; those that may be read begin with the prefix."""
        layers: list[Any] = [] if self.inner is None else self.inner.layers
        if self.prefixes.length == 0 or not self.readable:
            return layers
        layers = layers + [None] * (max(self.readable) + 1 - len(layers))
        return [self._readable(i, layer) if i in self.readable else layer for i, layer in enumerate(layers)]

    def _readable(self, layer_idx: int, layer: Any) -> _ReadableLayer:
        key, value = self.prefixes.pairs[self.sites[layer_idx]]
        if layer is None or not layer.is_initialized or layer.keys.numel() == 0:
            return _ReadableLayer(key.to(self.readable[layer_idx]), value.to(self.readable[layer_idx]))
        keys = self._joined("keys", layer_idx, key, layer.keys)
        return _ReadableLayer(keys, self._joined("values", layer_idx, value, layer.values))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the keys and values ``[B, Hkv, S, D]``, and return those of the prefix, of earlier calls, and these."""
        site = self.sites.get(layer_idx)
        if self.recorded is not None and site is not None:
            self.recorded[site] = key_states, value_states
        dropped = self._inner_sizes(key_states.shape[2], layer_idx)[1] > 0
        keys, values = key_states, value_states
        if self.inner is not None:
            keys, values = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        if dropped or self.prefixes.length == 0:
            return keys, values
        if site is None:
            raise ValueError(
                f"layer {layer_idx} of the cache: expected one of {sorted(self.sites)}, which have a prefix"
            )
        key, value = self.prefixes.pairs[site]
        return self._joined("keys", layer_idx, key, keys), self._joined("values", layer_idx, value, values)

    def _joined(self, what: str, layer_idx: int, prefix: Tensor, states: Tensor) -> Tensor:
        if (prefix.shape[1], prefix.shape[3]) != (states.shape[1], states.shape[3]):
            raise ValueError(
                f"{self.names[layer_idx]}: expected {what} of {prefix.shape[1]} heads and head dim {prefix.shape[3]}, "
                f"as read from the module when the model was prepared, got {states.shape[1]} and {states.shape[3]}: "
                "this kind of attention is not understood"
            )
        return torch.cat([prefix.to(states.device, states.dtype), states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens before those of the next call, those of the prefix included."""
        return self.prefixes.length + (0 if self.inner is None else self.inner.get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of the keys that :meth:`update` will return, and of tokens before the first of them."""
        length, offset = self._inner_sizes(query_length, layer_idx)
        if self.prefixes.length and isinstance(offset, int) and offset > 0:
            # A sliding window that has dropped keys has dropped the prefix before them.
            return length, offset + self.prefixes.length
        return length + self.prefixes.length, offset

    def _inner_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (query_length, 0) if self.inner is None else self.inner.get_mask_sizes(query_length, layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Number of tokens for which there is room, those of the prefix included; -1: there is no limit."""
        length = -1 if self.inner is None or not self.layers else self.inner.get_max_length(layer_idx)
        return length if length < 0 else length + self.prefixes.length


class _BothCaches(EncoderDecoderCache):
    """The two caches of a decoder with cross-attention, the first of which has a prefix."""

    def __init__(self, inner: EncoderDecoderCache, **arguments: Any) -> None:
        super().__init__(PrefixCache(inner.self_attention_cache, **arguments), inner.cross_attention_cache)
        self.is_updated = inner.is_updated
        self.inner = inner


def with_prefix(cache: Cache | None, **arguments: Any) -> PrefixCache | _BothCaches:
    """Put a prefix before the self-attention's entries of ``cache``, with the arguments of :class:`PrefixCache`."""
    if isinstance(cache, EncoderDecoderCache):
        return _BothCaches(cache, **arguments)
    return PrefixCache(cache, **arguments)


def without_prefix(cache: PrefixCache | _BothCaches) -> Cache | None:
    """Undo :func:`with_prefix`."""
    return cache.inner


def has_prefix(cache: object) -> TypeGuard[PrefixCache | _BothCaches]:
    """Return True if ``cache`` is the result of :func:`with_prefix`."""
    return isinstance(cache, PrefixCache | _BothCaches)
