"""Ceilings of this GPU: the most that its tensor cores and memory were measured to do, in this very process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.cuda.timing import Timer


@dataclass(frozen=True)
class GpuCeilings:
    """The best rates of this GPU."""

    tflops: float  # of a large matrix product in the cells' dtype
    gbps: float  # read and written by a large copy


def measure_ceilings(timer: Timer, dtype: torch.dtype, rounds: int = 10) -> GpuCeilings:
    """Measure both ceilings, each the best of ``rounds``."""
    size, copied = 8192, 2**29
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.empty(copied, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = timer({"matrix": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds)
    best = {name: min(each) for name, each in times.items()}
    return GpuCeilings(2 * size**3 / best["matrix"] / 1e9, 2 * copied / best["copy"] / 1e6)
