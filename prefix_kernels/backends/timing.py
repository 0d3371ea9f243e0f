"""The backend ``"benchmark"``: both are timed on the first call of a shape class, and the faster one is remembered."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from prefix_kernels.backends.call import Call

_ROUNDS = 5
_remembered: dict[Hashable, str] = {}


def _rounded(length: int) -> int:
    """The next power of two."""
    return 1 << max(length - 1, 0).bit_length()


def _shape_class(call: Call) -> Hashable:
    """Calls of one class take the same backend: lengths and batches count by their next power of two."""
    given = [(name, x) for name, x in zip(call._fields, call, strict=True) if isinstance(x, Tensor)]
    sizes = tuple(
        (name, tuple(_rounded(size) if i in (0, x.dim() - 2) else size for i, size in enumerate(x.shape)))
        for name, x in given
    )
    asking = torch.is_grad_enabled(), *(x.requires_grad for _, x in given)
    settings = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), call.sees_up_to_itself
    return sizes, asking, settings, str(call.query.device), call.query.dtype


def can_time(query: Tensor) -> bool:
    """Tell if running and waiting is possible: not while tracing or capturing a graph."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if isinstance(query, FakeTensor) or query.is_meta:
        return False
    return not (query.is_cuda and torch.cuda.is_current_stream_capturing())


def remembered(call: Call) -> str | None:
    """The backend that was faster for calls of this class; None: not timed yet."""
    return _remembered.get(_shape_class(call))


def forget() -> None:
    """Time every class anew."""
    _remembered.clear()


def _seconds(run: Callable[[], None], query: Tensor) -> float:
    if query.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _run(call: Call, attention: Callable[..., Tensor], backend: str) -> None:
    """Forward, and backward if a tensor asks for a gradient."""
    own = {
        name: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in call._asdict().items()
    }
    # Hooks around the call, such as those of activation checkpointing, must not see what is saved here: they would run
    # the call, and its timing, anew.
    with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
        out = attention(**own, backend=backend)
        if out.requires_grad:
            asking = [x for x in own.values() if isinstance(x, Tensor) and x.requires_grad]
            torch.autograd.grad(out, asking, torch.ones_like(out))


def _unchanged(saved: Tensor) -> Tensor:
    return saved


def faster_backend(call: Call, attention: Callable[..., Tensor]) -> str:
    """Time both backends in turns, after one run each that is not counted, and remember the one of the lower median.

    Args:
        attention: :func:`prefix_kernels.prefix_attention`.
    """
    times: dict[str, list[float]] = {"fused": [], "split": []}
    for turn in range(_ROUNDS + 1):
        for backend, seconds in times.items():
            took = _seconds(functools.partial(_run, call, attention, backend), call.query)
            if turn > 0:
                seconds.append(took)
    faster = min(times, key=lambda backend: statistics.median(times[backend]))
    _remembered[_shape_class(call)] = faster
    return faster
