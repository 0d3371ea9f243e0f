"""The constants of each CUDA kernel, computed by a program that includes the kernels' headers."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..environment import CudaToolkit, find_compiler
from .tools import CHECKOUT, run


@dataclass(frozen=True)
class Kernel:
    """A kernel's constants, as its header computes them.

    Attributes:
        name: ``forward``, ``decode``, ``backward columns``, ``backward rows`` or ``backward one pass``.
        variant: template arguments beside dtype and head dim, in words.
        threads, shared_bytes: of a block.
        stage_trips: iterations of the hot loop in one stage; 1 if a stage is one iteration.
        copy_trips: iterations of a loop that copies a tile row by row.
        mask_trips: iterations of a loop that reads one row of a mask for a tile.
        scores: scores that a thread holds in one iteration of the hot loop.
    """

    name: str
    head_dim: int
    variant: str
    threads: int
    shared_bytes: int
    stage_trips: int
    copy_trips: int
    mask_trips: int
    scores: int


_CONSTANTS = """
#include <cstdio>
#include "csrc/cuda/sm80/backward/columns.cuh"
#include "csrc/cuda/sm80/backward/one_pass.cuh"
#include "csrc/cuda/sm80/backward/rows.cuh"
#include "csrc/cuda/sm80/decode/params.cuh"
#include "csrc/cuda/sm80/forward/params.cuh"
using namespace prefix_kernels::cuda;
using namespace prefix_kernels::cuda::sm80;

int pass_rows(int head_dim, int threads) { return threads / (head_dim % 64 == 0 ? 8 : 4); }

void print(const char* kernel, int d, int a, int b, int c, int e, int threads, int bytes, int stages, int rows,
           int scores) {
  printf("%s %d %d %d %d %d %d %d %d %d %d %d\\n", kernel, d, a, b, c, e, threads, bytes, stages,
         rows / pass_rows(d, threads), (rows + 31) / 32, scores);
}

template <int d, bool general, bool dropout, int blocks>
void forward() {
  using X = ForwardTraits<bfloat16, d, general, dropout, blocks>;
  print("forward", d, general, dropout, blocks, 0, X::kThreads, X::kSharedBytes, 1, X::kColumns,
        X::kWarpRows * X::kColumns / 32);
}
template <int d, bool wide>
void decode() {
  using X = DecodeTraits<bfloat16, d, wide>;
  print("decode", d, wide, 0, 0, 0, X::kThreads, X::kSharedBytes, 1, kCell, 8);
}
template <int d, bool key, bool value, bool general, bool fuses>
void columns() {
  using X = ColumnsTraits<bfloat16, d, key, value, general, fuses>;
  print("columns", d, key, value, general, fuses, kBackwardThreads, ColumnsShared<X>::kBytes, X::kBlockM / kCell,
        X::kBlockM, 8 * X::kTiles);
}
template <int d, bool general>
void rows() {
  using X = RowsTile<d, general>;
  print("rows", d, general, 0, 0, 0, kBackwardThreads, RowsShared<bfloat16, d, general>::kBytes, X::kCells,
        X::kBlockN, 8 * X::kTiles);
}
template <int d>
void one_pass() {
  using X = OnePassTraits<bfloat16, d>;
  print("one_pass", d, 0, 0, 0, 0, X::kThreads, OnePassShared<X>::kBytes, 1, X::kBlockM,
        X::kBlockM * X::kBlockN / X::kThreads);
}
template <int d>
void all() {
  forward<d, false, false, 1>(); forward<d, false, true, 1>(); forward<d, true, false, 1>();
  if constexpr (d <= 128) { forward<d, false, false, 2>(); forward<d, false, true, 2>(); }
  if constexpr (d <= 64) forward<d, true, false, 2>();
  decode<d, false>(); decode<d, true>();
  columns<d, true, d <= 128, false, false>(); columns<d, true, d <= 128, true, false>();
  columns<d, false, true, false, false>(); columns<d, false, true, true, false>();
  if constexpr (d <= 128) { columns<d, true, true, false, true>(); columns<d, true, true, true, true>(); }
  rows<d, false>(); rows<d, true>();
  if constexpr (kHasOnePass<d>) one_pass<d>();
}
int main() { all<32>(); all<64>(); all<96>(); all<128>(); all<192>(); all<256>(); }
"""


def kernel_constants(toolkit: CudaToolkit) -> dict[tuple[str, ...], Kernel]:
    """Every kernel's constants by the arguments of its template: ``("forward", "128", "0", "2")``."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "constants.cu"), Path(folder, "constants")
        source.write_text(_CONSTANTS)
        compiler = [str(toolkit.home / "bin" / "nvcc"), "-ccbin", find_compiler()[0], "-std=c++20", f"-I{CHECKOUT}"]
        run([*compiler, "-gencode=arch=compute_80,code=sm_80", str(source), "-o", str(program)])
        lines = run([str(program)]).split("\n")
    kernels: dict[tuple[str, ...], Kernel] = {}
    for line in filter(None, lines):
        kind, d, a, b, c, e, *numbers = line.split()
        key: tuple[str, ...] = (kind, d, a)
        on = [argument == "1" for argument in (a, b, c, e)]
        if kind == "forward":
            key, name = (kind, d, a, b, c), "forward"
            words = ["general" if on[0] else "dropout" if on[1] else "plain", f"{16 * int(c)} rows a warp"]
        elif kind == "decode":
            name, words = "decode", ["wide" if on[0] else "narrow"]
        elif kind == "columns":
            sums = " ".join(word for word, wanted in zip(("dK", "dV"), on, strict=False) if wanted)
            key, name = (kind, d, a, b, c, e), "backward columns"
            words = ["general" if on[2] else "plain", sums, *(["delta"] if on[3] else [])]
        elif kind == "one_pass":
            key, name, words = (kind, d), "backward one pass", ["plain"]
        else:
            name, words = "backward rows", ["general" if on[0] else "plain"]
        kernels[key] = Kernel(name, int(d), ", ".join(words), *map(int, numbers))
    return kernels


def template_arguments(symbol: str) -> tuple[str, ...] | None:
    """The key of `kernel_constants` for a mangled name; None for kernels without tensor cores."""
    kinds = {"forward_kernel": "forward", "decode_kernel": "decode", "backward_columns": "columns"}
    kinds |= {"backward_rows": "rows", "backward_one_pass": "one_pass"}
    for function, kind in kinds.items():
        if f"{len(function)}{function}I" in symbol and "4sm80" in symbol:
            return kind, *(number for _, number in re.findall(r"L([ib])(\d+)E", symbol))
    return None
