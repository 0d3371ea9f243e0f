"""The backend of one call, and the reasons for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefix_kernels.backends import timing
from prefix_kernels.backends.call import Call, why_not_split
from prefix_kernels.backends.libraries import library_for
from prefix_kernels.backends.setting import Backend
from prefix_kernels.backends.split import is_folded, log
from prefix_kernels.backends.table import CPU_MEASURED, HAS_AMX, Shape, prefers_split


@dataclass(frozen=True)
class BackendChoice:
    """The backend of a call, and the kernels behind it.

    Attributes:
        backend: ``"fused"`` or ``"split"``.
        reason: why this one.
        sequence: what attends to the sequence.
        prefix: what attends to the prefix.
    """

    backend: str
    reason: str
    sequence: str = "prefix_kernels"
    prefix: str = "prefix_kernels"

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}; sequence by {self.sequence}, prefix by {self.prefix}"


def is_always_fused(asked: Backend, query: Tensor) -> bool:
    """Tell if a call needs no further questions."""
    return asked == "fused" or (asked == "auto" and not HAS_AMX and query.device.type == "cpu")


def choose(call: Call, asked: Backend, attention: Callable[..., Tensor]) -> str:
    """The backend of a call, ``"fused"`` or ``"split"``.

    Args:
        asked: what the call or :class:`~prefix_kernels.attention_backend` names.
        attention: :func:`prefix_kernels.prefix_attention`, for ``"benchmark"``.

    Raises:
        ValueError: ``"split"`` is asked for and cannot serve.
    """
    chosen, reason = _choose(call, asked)
    if asked == "benchmark" and timing.can_time(call.query) and _split_serves(call):
        chosen, reason = _timed(call) or (timing.faster_backend(call, attention), "timed")
    if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
        log.debug("prefix_attention: %s: %s", chosen, reason)
    return chosen


def _split_serves(call: Call) -> bool:
    if why_not_split(call) is not None or not call.has_four_dimensions:
        return False
    return not isinstance(library_for(call.query, call.key, call.value, call.sees_up_to_itself, call.scale), str)


def _timed(call: Call) -> tuple[str, str] | None:
    faster = timing.remembered(call)
    return None if faster is None else (faster, "timed")


def _choose(call: Call, asked: Backend) -> tuple[str, str]:
    if is_always_fused(asked, call.query):
        return "fused", "asked for" if asked == "fused" else CPU_MEASURED
    why_not = why_not_split(call)
    if asked == "split":
        if why_not is not None:
            raise ValueError(f"backend: 'split' cannot serve this call: {why_not}")
        return "split", "asked for"
    if why_not is not None:
        return "fused", why_not
    if not call.has_four_dimensions:
        return "fused", "left to the checks of the operator"
    batch, heads, query_len, head_dim = call.query.shape
    key_len = call.key.shape[2] / 2 if call.sees_up_to_itself else call.key.shape[2]
    shape = Shape(batch, heads, query_len, key_len, head_dim, call.trains_sequence)
    prefers, basis = prefers_split(shape, call.query.device, call.query.dtype)
    return ("split" if prefers else "fused"), basis


def choice_of(call: Call, asked: Backend) -> BackendChoice:
    """Like :func:`choose`, without timing, and with the names of what would run at this moment.

    Raises:
        ValueError: as :func:`choose`.
    """
    chosen, reason = (_timed(call) if asked == "benchmark" else None) or _choose(call, asked)
    if chosen == "fused":
        return BackendChoice("fused", reason)
    library = library_for(call.query, call.key, call.value, call.sees_up_to_itself, call.scale)
    if isinstance(library, str):
        if asked == "split":
            raise ValueError(f"backend: 'split' cannot serve this call: {library}")
        return BackendChoice("fused", library)
    if call.prefix_key is None:
        return BackendChoice("split", reason, library.name, "nothing: there is none")
    folded = is_folded(call.query, call.prefix_key, call.prefix_ids, call.prefix_lens)
    return BackendChoice("split", reason, library.name, library.name if folded else "prefix_kernels")
