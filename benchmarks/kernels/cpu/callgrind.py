"""Instructions of the CPU kernels, counted by valgrind's callgrind and sorted by their purpose."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch

from benchmarks.common.cells import Cell, select
from benchmarks.common.contenders import make_dout, make_inputs, prepare
from benchmarks.common.table import Row
from benchmarks.kernels.cpu.baselines import ours
from benchmarks.kernels.cpu.plan import plan

_LANES = 8  # of AVX2, in float32
_MOST_FLOPS = 2**29  # of a cell that is cut down: valgrind takes a few seconds for as many

# Purpose, and a pattern of the names of its functions; the first that matches counts.
KINDS = {
    "decoding": r"DecodeBlock",
    "products and softmax": r"gemm|Probabilities|ScoreGradients|OnlineSoftmax|Scores<",
    "moving operands": r"pack_|copy_|scale_row|write_|keep_partial|memset|memcpy|memmove|finish_block",
    "masks and dropout": r"dropout_bits|KeyBias|KeyPlan|TileBias|TilePlan|QueryBlock",
    "row sums of dout * out": r"row_dot",
    "prefetches": r"Prefetcher",
    "sums over threads' parts": r"sum_prefix|sum_sequence|merge_partials",
}
OTHER = "the rest"


def cells_of(wishes: list[str]) -> list[Cell]:
    """One batch row and one key head of every cell that fulfils the wishes, long ones left out."""
    cells = [cell.one_head() for cell in select(plan(), wishes)]
    return [cell for cell in dict.fromkeys(cells) if cell.flops() <= _MOST_FLOPS]


def kind_of(function: str) -> str:
    """The purpose of a function, told by its name and template arguments alone."""
    function = re.sub(r"\([\w:]*ALayout\)", "", function).partition("(")[0]
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, function)), OTHER)


def read_profile(text: str) -> Counter[str]:
    """Instructions by kind, from a callgrind profile with uncompressed names: each function's own, not its callees'."""
    counts: Counter[str] = Counter()
    kind, is_inclusive = OTHER, False
    for line in text.splitlines():
        if line.startswith("fn="):
            kind = kind_of(line)
        elif line.startswith("calls="):
            is_inclusive = True  # the next line is what the call cost
        elif re.match(r"[\d+*-]", line):
            if not is_inclusive:
                counts[kind] += int(line.split()[-1])
            is_inclusive = False
    return counts


def _build_dump(folder: Path) -> Path:
    """A library whose ``dump`` makes callgrind write the counts so far, and start anew."""
    source, library = folder / "dump.c", folder / "dump.so"
    source.write_text("#include <valgrind/callgrind.h>\nvoid dump(void) { CALLGRIND_DUMP_STATS; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def run_cells(cells: list[Cell], library: str) -> None:
    """Run each cell's pass under valgrind, and dump twice: the counts before the pass, then those of the pass.

    Args:
        library: path of the library that `count` has built.
    """
    dump = ctypes.CDLL(library).dump
    torch.set_num_threads(1)
    for cell in cells:
        inputs = make_inputs(cell, "cpu")
        call = prepare(cell, ours(cell), inputs, make_dout(inputs[0]))
        dump()
        call()
        dump()


def count(cells: list[Cell], child: list[str]) -> list[tuple[Cell, Counter[str]]]:
    """The instructions of every cell, by kind.

    Args:
        child: a command to which the path of a library is appended, and which calls `run_cells` with both.

    Raises:
        RuntimeError: there is no valgrind, or it failed.
    """
    if shutil.which("valgrind") is None:
        raise RuntimeError("valgrind is not installed: apt-get install valgrind")
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}"]
        command += ["--compress-strings=no", "--compress-pos=no"]
        command += ["--toggle-collect=*attention_forward<*", "--toggle-collect=*attention_backward<*"]
        command += [*child, str(_build_dump(profile.parent))]
        environment = os.environ | {"PREFIX_KERNELS_CPU_ISA": "avx2"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"valgrind failed:\n{done.stderr[-2000:]}")
        # Callgrind numbers its dumps from 1.
        return [(cell, read_profile(Path(f"{profile}.{2 * i}").read_text())) for i, cell in enumerate(cells, 1)]


def row_of(cell: Cell, counts: Counter[str]) -> Row:
    """The row of the CSV: instructions per multiply-add that the cell needs, all together and by kind."""
    needed = cell.flops() / 2 / _LANES
    kinds = {kind: round(counts[kind] / needed, 3) for kind in [*KINDS, OTHER]}
    return cell.columns() | {"multiply_adds": round(needed), "all": round(counts.total() / needed, 3)} | kinds
