"""The selection and the recording that are open around the calls of one model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixPair

Selection = TypeVar("Selection")


@dataclass(frozen=True, eq=False)
class Surroundings(Generic[Selection]):
    """The things that are open in one thread or asyncio task.

    Attributes:
        selection: the prefixes that calls see which name none themselves.
        recorded: gets the keys and values ``[B, Hkv, Sk, D]`` of the calls, by site, which then see no prefix.
    """

    selection: Selection | None = None
    recorded: dict[int, PrefixPair] | None = None


_NOTHING: Surroundings[Any] = Surroundings()


class CallContext(Generic[Selection]):
    """Keeps what is open around the calls of one model, apart for each thread and asyncio task.

    A copy of it, as ``copy.deepcopy`` and ``pickle`` of the model make one, has nothing open.

    Attributes:
        open_count: the number of things that are open in all threads. Compiled code guards on it, where it cannot look
            into a ContextVar.
    """

    def __init__(self) -> None:
        self.open_count = 0
        self._lock = threading.Lock()
        self._surroundings: ContextVar[Surroundings[Selection]] = ContextVar("surroundings", default=_NOTHING)

    def __reduce__(self) -> tuple[type[CallContext[Any]], tuple[()]]:
        return CallContext, ()

    @contextmanager
    def opened(self, **changes: Any) -> Iterator[None]:
        """While the block runs, the named attributes of :class:`Surroundings` have these values in its thread."""
        with self._lock:
            self.open_count += 1
        token = self._surroundings.set(replace(self._surroundings.get(), **changes))
        try:
            yield
        finally:
            self._surroundings.reset(token)
            with self._lock:
                self.open_count -= 1

    @property
    def selection(self) -> Selection | None:
        """The open selection, if any. A compiled graph is broken only where something is open in some thread."""
        return _look_into(self._surroundings).selection if self.open_count else None

    @property
    def recorded(self) -> dict[int, PrefixPair] | None:
        """The content of the open recording, if any."""
        return _look_into(self._surroundings).recorded if self.open_count else None


@torch.compiler.disable
def _look_into(variable: ContextVar[Surroundings[Selection]]) -> Surroundings[Selection]:
    return variable.get()
