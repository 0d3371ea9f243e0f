"""Ceilings of this machine: the most that its processor and memory were measured to do, in this very process.

``ceilings.cpp`` is compiled for the instruction set that the kernels use and run on the same OpenMP threads: chains of
float32 multiply-adds, dot products of bfloat16 where the processor has them, reading and copying. A ceiling is the best
of many short runs.

The floor of a computation is the longer of two times: of its FLOPs in such chains, and of reading the bytes that it
must move, from DRAM when the caches were flushed before, else from where the last reading left them. Other tenants of
the machine slow it down as they do what is measured, so it is run, in turns with the contenders.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import prefix_kernels  # noqa: F401  (registers the operators)
from benchmarks.kernels.cpu.caches import last_level_cache

# Floats by which loads are prefetched; the best distance differs from machine to machine.
_PREFETCH = (0, 64, 256)
_AVX2_FLAGS = ["-mavx2", "-mfma"]
_ISA_FLAGS = {
    "portable": ["-DLANES=4"],
    "avx2": [*_AVX2_FLAGS, "-DLANES=8"],
    "avx512": [*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-DLANES=16"],
}


def has_bfloat16_dot(isa: str) -> bool:
    """True if the processor multiplies pairs of bfloat16 and adds them in float32, and ``isa`` uses that."""
    cpuinfo = Path("/proc/cpuinfo")
    return isa == "avx512" and cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text().split()


def build(isa: str, bfloat16_dot: bool) -> ctypes.CDLL:
    """``ceilings.cpp``, compiled by ``$CXX`` and loaded.

    Raises:
        RuntimeError: it does not compile.
    """
    source = Path(__file__).with_name("ceilings.cpp")
    flags = _ISA_FLAGS[isa] + (["-mavx512bf16"] if bfloat16_dot else [])
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        command = [*compiler, "-O2", "-fopenmp", "-shared", "-fPIC", *flags, str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: exit status {done.returncode}\n{done.stderr}")
        loaded = ctypes.CDLL(str(library))
    for name in ("multiply_add", "read_memory", "copy_memory", *(["bfloat16_dot"] if bfloat16_dot else [])):
        getattr(loaded, name).restype = ctypes.c_double
    return loaded


@dataclass(frozen=True)
class CpuCeilings:
    """The best GFLOP/s and GB/s of all threads together."""

    isa: str
    threads: int
    fma_gflops: float  # multiply-adds in float32
    bfloat16_dot_gflops: float | None  # None: the instruction set has no such instruction
    matmul_gflops: float  # torch.mm in float32, to compare with fma_gflops
    read_gbps: float  # from DRAM
    copy_gbps: float  # from and to DRAM, bytes read and written
    cache_gbps: float  # read from the last-level cache
    cache_bytes: int

    def columns(self) -> dict[str, object]:
        """The ceilings' columns in the results table, by name."""
        numbers = asdict(self)
        names = [name for name in numbers if name.endswith(("_gflops", "_gbps"))]
        return {name: "" if numbers[name] is None else f"{numbers[name]:.1f}" for name in names}

    def __str__(self) -> str:
        dot = "none" if self.bfloat16_dot_gflops is None else f"{self.bfloat16_dot_gflops:.0f} GFLOP/s"
        return (
            f"{self.isa}, {self.threads} threads: float32 multiply-add {self.fma_gflops:.0f} GFLOP/s "
            f"(torch.mm {self.matmul_gflops:.0f}), bfloat16 dot product {dot}; DRAM read {self.read_gbps:.1f} GB/s, "
            f"copy {self.copy_gbps:.1f} GB/s; last-level cache ({self.cache_bytes / 2**20:.0f} MiB) read "
            f"{self.cache_gbps:.0f} GB/s"
        )


def _best(work: Callable[[], float], repeats: int) -> float:
    """The highest rate of several runs: the amount that ``work`` returns, per nanosecond."""
    best = 0.0
    for _ in range(repeats):
        begin_ns = time.perf_counter_ns()
        done = work()
        best = max(best, done / (time.perf_counter_ns() - begin_ns))
    return best


class CeilingLoops:
    """The loops of ``ceilings.cpp`` on ``threads`` threads; each returns its amount of work, FLOPs or bytes."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.isa = torch.ops.prefix_kernels.cpu_isa()
        self.has_bfloat16_dot = has_bfloat16_dot(self.isa)
        self.cache_bytes = last_level_cache()
        self.ahead = _PREFETCH[0]  # floats by which reads are prefetched
        self._library = build(self.isa, self.has_bfloat16_dot)
        # ceilings.cpp asks for multiples of this many floats.
        self._unit = 64 * threads
        self._source = torch.ones(max(4 * self.cache_bytes, 2**28) // 4 // self._unit * self._unit)
        self._target = torch.ones_like(self._source)

    def multiply_add(self, steps: int) -> float:
        return self._library.multiply_add(self.threads, ctypes.c_long(steps))

    def bfloat16_dot(self, steps: int) -> float:
        return self._library.bfloat16_dot(self.threads, ctypes.c_long(steps))

    def read(self, size: int) -> float:
        """Read about ``size`` bytes of the source."""
        done, units = 0.0, max(1, round(size / 4 / self._unit))
        while units > 0:
            count = min(units * self._unit, self._source.numel())
            pointer = ctypes.c_void_p(self._source.data_ptr())
            done += self._library.read_memory(
                self.threads, pointer, ctypes.c_ssize_t(count), ctypes.c_ssize_t(self.ahead)
            )
            units -= count // self._unit
        return done

    def read_memory(self) -> float:
        return self.read(self._source.numel() * 4)

    def copy_memory(self) -> float:
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (self._target, self._source))
        return self._library.copy_memory(self.threads, *pointers, ctypes.c_ssize_t(self._source.numel()))

    def floors(self, flops: int, moved: int, dtype: str) -> dict[str, Callable[[], float]]:
        """Calls that compute ``flops``, and read ``moved`` bytes, and do nothing else.

        float16 is converted to float32, as is bfloat16 where the processor does not multiply it.
        """
        uses_dot = dtype == "bfloat16" and self.has_bfloat16_dot
        loop = self.bfloat16_dot if uses_dot else self.multiply_add
        steps = max(1, round(flops * (2 if dtype == "float64" else 1) / loop(1)))
        return {"floor_flops": lambda: loop(steps), "floor_bytes": lambda: self.read(moved)}


def measure_ceilings(loops: CeilingLoops, repeats: int = 40) -> CpuCeilings:
    """Measure all ceilings, which takes about five seconds with the default.

    The last-level cache is read from a quarter of its size. ``loops`` prefetch from then on as far ahead as was best.
    """
    steps = 200_000  # some milliseconds
    few = max(2, repeats // 4)
    rates = {}
    for loops.ahead in _PREFETCH:
        rates[loops.ahead] = _best(loops.read_memory, few)
    loops.ahead = max(rates, key=rates.__getitem__)

    size = 2048
    a, b, product = (torch.ones(size, size) for _ in range(3))

    def multiply() -> float:
        torch.mm(a, b, out=product)
        return 2.0 * size**3

    return CpuCeilings(
        isa=loops.isa,
        threads=loops.threads,
        fma_gflops=_best(lambda: loops.multiply_add(steps), repeats),
        bfloat16_dot_gflops=_best(lambda: loops.bfloat16_dot(steps), repeats) if loops.has_bfloat16_dot else None,
        matmul_gflops=_best(multiply, few),
        read_gbps=rates[loops.ahead],
        copy_gbps=_best(loops.copy_memory, few),
        cache_gbps=_best(lambda: loops.read(loops.cache_bytes // 4), repeats),
        cache_bytes=loops.cache_bytes,
    )
