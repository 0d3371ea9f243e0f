"""The ceilings of this machine: what its processor and memory were measured to do at best, in this very process.

    python benchmarks/roofline.py --threads 2

``ceilings.cpp`` is compiled for the instruction set that the kernels use and run on the same OpenMP threads: chains of
float32 multiply-adds, dot products of bfloat16 where the processor has them, reading and copying. A ceiling is the best
of many short runs; even so, processors that others use too lower it.

The floor of a computation is the longer of two times: its FLOPs at the peak, and the bytes that it must move at the
bandwidth of reading from where they lie. That is DRAM when the caches were flushed before, or when the bytes fill more
than half of the last-level cache; else it is that cache.
"""

from __future__ import annotations

import argparse
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
from torch import Tensor

import prefix_kernels  # noqa: F401  (registers the operators)

# Floats by which loads are prefetched; the best distance differs from machine to machine.
_PREFETCH = (0, 64, 256)
_AVX2_FLAGS = ["-mavx2", "-mfma"]
_ISA_FLAGS = {
    "portable": ["-DLANES=4"],
    "avx2": [*_AVX2_FLAGS, "-DLANES=8"],
    "avx512": [*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-DLANES=16"],
}


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=2**25)


def has_bfloat16_dot(isa: str) -> bool:
    """Whether the processor multiplies pairs of bfloat16 and adds them in float32, and ``isa`` uses it."""
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
class Ceilings:
    """GFLOP/s and GB/s of all threads together."""

    isa: str
    threads: int
    fma_gflops: float  # multiply-adds in float32
    bfloat16_dot_gflops: float | None  # None: the instruction set has no such instruction
    matmul_gflops: float  # torch.mm in float32, to compare with fma_gflops
    read_gbps: float  # from DRAM
    copy_gbps: float  # from and to DRAM, bytes read and written
    cache_gbps: float  # read from the last-level cache
    cache_bytes: int

    def peak_gflops(self, dtype: str) -> float:
        """Of the instructions that may compute with ``dtype``; float16 is converted to float32."""
        if dtype == "bfloat16" and self.bfloat16_dot_gflops is not None:
            return self.bfloat16_dot_gflops
        return self.fma_gflops / 2 if dtype == "float64" else self.fma_gflops

    def bandwidth_gbps(self, moved: int, is_cold: bool) -> float:
        """At which ``moved`` bytes can come; ``is_cold``: nothing of them is in a cache."""
        return self.read_gbps if is_cold or moved > self.cache_bytes / 2 else self.cache_gbps

    def floor_ms(self, flops: int, moved: int, dtype: str, is_cold: bool) -> float:
        compute = flops / self.peak_gflops(dtype)
        return max(compute, moved / self.bandwidth_gbps(moved, is_cold)) / 1e6

    def columns(self) -> dict[str, object]:
        """What the table calls them."""
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
    """The most of ``work``'s result, how much it did, that was done per nanosecond."""
    best = 0.0
    for _ in range(repeats):
        begin_ns = time.perf_counter_ns()
        done = work()
        best = max(best, done / (time.perf_counter_ns() - begin_ns))
    return best


def measure_ceilings(threads: int, repeats: int = 40) -> Ceilings:
    """Takes about five seconds with the default; the last-level cache is read from a quarter of its size."""
    isa = torch.ops.prefix_kernels.cpu_isa()
    has_dot = has_bfloat16_dot(isa)
    library = build(isa, has_dot)
    steps = ctypes.c_long(200_000)  # some milliseconds

    # Sizes in floats, multiples of what ceilings.cpp asks for.
    unit = 64 * threads
    cache = last_level_cache()
    in_cache, in_memory = (size // 4 // unit * unit for size in (cache // 4, max(4 * cache, 2**28)))
    source = torch.ones(in_memory)
    target = torch.ones(in_memory)

    def read(count: int, ahead: int) -> float:
        pointer = ctypes.c_void_p(source.data_ptr())
        return library.read_memory(threads, pointer, ctypes.c_ssize_t(count), ctypes.c_ssize_t(ahead))

    def read_gbps(count: int, repeats: int) -> float:
        return max(_best(lambda ahead=ahead: read(count, ahead), repeats) for ahead in _PREFETCH)

    def copy() -> float:
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (target, source))
        return library.copy_memory(threads, *pointers, ctypes.c_ssize_t(in_memory))

    size = 2048
    a, b, product = (torch.ones(size, size) for _ in range(3))

    def multiply() -> float:
        torch.mm(a, b, out=product)
        return 2.0 * size**3

    few = max(2, repeats // 4)
    return Ceilings(
        isa=isa,
        threads=threads,
        fma_gflops=_best(lambda: library.multiply_add(threads, steps), repeats),
        bfloat16_dot_gflops=_best(lambda: library.bfloat16_dot(threads, steps), repeats) if has_dot else None,
        matmul_gflops=_best(multiply, few),
        read_gbps=read_gbps(in_memory, few),
        copy_gbps=_best(copy, few),
        cache_gbps=read_gbps(in_cache, repeats),
        cache_bytes=cache,
    )


class CacheFlush:
    """Calling it leaves in the caches nothing that was there before."""

    def __init__(self) -> None:
        self._buffer: Tensor = torch.ones(max(4 * last_level_cache(), 2**27) // 4)

    def __call__(self) -> None:
        self._buffer.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(measure_ceilings(arguments.threads, arguments.repeats))


if __name__ == "__main__":
    main()
