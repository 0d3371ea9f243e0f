"""Recording of the keys and values of a sequence, from a prepared model that runs without any prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from prefix_kernels.integrations.transformers.runtime.selection import PrefixSource, counted_open
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixPair

_recordings: ContextVar[Mapping[int, dict[int, PrefixPair]]] = ContextVar("prefix_recordings", default={})  # noqa: B039


@contextmanager
def recording(owner: PrefixSource) -> Iterator[dict[int, PrefixPair]]:
    """While it is open, the model of the tasks ``owner`` runs without a prefix in this thread.

    Yields:
        What its attentions are given: the keys and values ``[B, Hkv, Sk, D]`` of the sequence, by site.
    """
    recorded: dict[int, PrefixPair] = {}
    with counted_open(owner):
        token = _recordings.set({**_recordings.get(), id(owner): recorded})
        try:
            yield recorded
        finally:
            _recordings.reset(token)


@torch.compiler.disable
def _open_recording(owner: PrefixSource) -> dict[int, PrefixPair] | None:
    return _recordings.get().get(id(owner))


def find_recording(owner: PrefixSource) -> dict[int, PrefixPair] | None:
    """The recording that is open in this thread, if any."""
    return _open_recording(owner) if owner.open_selections else None
