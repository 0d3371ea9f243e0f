"""Times on a GPU: events around calls that the processor has queued ahead, with an empty L2; and what the GPU can do.

A call is measured by two events. Before the first of them a buffer larger than the L2 cache is read, which leaves
nothing there that the call would have to write back, and the device is kept busy for longer than the processor needs to
queue the call, so that neither Python nor launching is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.common.contenders import Call

Timer = Callable[[dict[str, Call], int], dict[str, list[float]]]


@dataclass
class EventTimer:
    """Milliseconds of calls, interleaved: every round takes each call once, beginning with another one."""

    cycles_per_second: float = 2e9  # not less than the device has
    flush: Tensor = field(init=False)

    def __post_init__(self) -> None:
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
        self.flush = torch.zeros(max(4 * l2, 2**28) // 4, dtype=torch.float32, device="cuda")

    def _queue_time(self, call: Call) -> float:
        """Seconds that the processor needs to queue the call."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def __call__(self, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
        names = list(calls)
        # At most 20 ms: a call that waits for the device itself is not kept waiting for seconds.
        ahead = {name: min(0.02, 2 * self._queue_time(calls[name]) + 1e-4) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            first = turn % len(names)
            events = []
            for name in names[first:] + names[:first]:
                self.flush.sum()
                torch.cuda._sleep(int(ahead[name] * self.cycles_per_second))
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                calls[name]()
                end.record()
                events.append((name, begin, end))
            torch.cuda.synchronize()
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end))
        return times


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches at best, measured."""

    tflops: float  # of a large matrix product in the cells' dtype
    gbps: float  # read and written by a large copy


def measure_ceilings(timer: Timer, dtype: torch.dtype, rounds: int = 10) -> Ceilings:
    size, copied = 8192, 2**29
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.empty(copied, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = timer({"matrix": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds)
    best = {name: min(each) for name, each in times.items()}
    return Ceilings(2 * size**3 / best["matrix"] / 1e9, 2 * copied / best["copy"] / 1e6)


def peak_memory(call: Call) -> float:
    """MiB that the call allocates at most, beyond what was there before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def median(times: list[float]) -> float:
    return statistics.median(times)
