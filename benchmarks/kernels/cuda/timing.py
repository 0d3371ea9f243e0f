"""Times on a GPU: events around calls that the processor has queued ahead, with an empty L2 cache; and peak memory.

A call is measured by two events. Before the first of them a buffer larger than the L2 cache is read, which leaves
nothing there that the call would have to write back, and the device is kept busy for longer than the processor needs to
queue the call, so that neither Python nor launching is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.common.contenders import Call, in_turns

Timer = Callable[[dict[str, Call], int], dict[str, list[float]]]


@dataclass
class EventTimer:
    """Milliseconds of calls, interleaved: every round takes each call once, in an order of its own."""

    cycles_per_second: float = 2e9  # at least the device's clock rate
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
        for order in in_turns(names, rounds):
            events = []
            for name in order:
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


def peak_memory(call: Call) -> float:
    """Most MiB that the call has allocated at a time, beyond those allocated before it."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
