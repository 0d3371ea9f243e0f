"""Where the instructions of the CPU kernels go: counted by valgrind's callgrind, whatever else the machine is doing.

    python benchmarks/kernels/cpu/instruction_counts.py [--where COLUMN=VALUE[,VALUE...]] [--output FILE]

Every cell of ``plan.py`` runs once, on one thread, cut down to one batch row and one key head; those that are long
even so are left out. Valgrind knows no AVX-512, so it is the AVX2 kernels that are counted. What a cell needs at least
are its FLOPs as multiply-adds of eight lanes; the table sets beside them all instructions of the kernels, by what they
are for. A register block of the matrix product has two instructions for each multiply-add that it needs: its loads,
broadcasts and the loop come on top.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.cells import Cell, select
from benchmarks.common.contenders import make_dout, make_inputs, prepare
from benchmarks.common.table import Row, Table
from benchmarks.kernels.cpu.baselines import ours
from benchmarks.kernels.cpu.plan import plan

RESULTS = Path(__file__).parents[2] / "results"
_LANES = 8  # of AVX2, in float32
_MOST_FLOPS = 2**29  # of a cell that is cut down: valgrind takes a few seconds for as many

# The first that is found in a function's name.
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
    """One batch row and one key head of every cell that fulfils the wishes and is short then."""
    cells = [
        replace(cell, batch=1, q_heads=cell.q_heads // cell.kv_heads, kv_heads=1) for cell in select(plan(), wishes)
    ]
    return [cell for cell in dict.fromkeys(cells) if cell.flops() <= _MOST_FLOPS]


def kind_of(function: str) -> str:
    """What a function is for; its arguments do not count."""
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


def build_dump(folder: Path) -> Path:
    """A library whose ``dump`` makes callgrind write what it has counted, and start anew."""
    source, library = folder / "dump.c", folder / "dump.so"
    source.write_text("#include <valgrind/callgrind.h>\nvoid dump(void) { CALLGRIND_DUMP_STATS; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def run_cells(cells: list[Cell], library: str) -> None:
    """What valgrind watches: of every cell what comes before its pass, then the pass."""
    dump = ctypes.CDLL(library).dump
    torch.set_num_threads(1)
    for cell in cells:
        inputs = make_inputs(cell, "cpu")
        call = prepare(cell, ours(cell), inputs, make_dout(inputs[0]))
        dump()
        call()
        dump()


def count(wishes: list[str]) -> list[tuple[Cell, Counter[str]]]:
    """The instructions of every cell of `cells_of`, by kind.

    Raises:
        RuntimeError: there is no valgrind, or it failed.
    """
    if shutil.which("valgrind") is None:
        raise RuntimeError("valgrind is not installed: apt-get install valgrind")
    cells = cells_of(wishes)
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}"]
        command += ["--compress-strings=no", "--compress-pos=no"]
        command += ["--toggle-collect=*attention_forward<*", "--toggle-collect=*attention_backward<*"]
        command += [sys.executable, __file__, "--run", str(build_dump(profile.parent))]
        command += [part for wish in wishes for part in ("--where", wish)]
        environment = os.environ | {"PREFIX_KERNELS_CPU_ISA": "avx2"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"valgrind failed:\n{done.stderr[-2000:]}")
        # Callgrind numbers its dumps from 1.
        return [(cell, read_profile(Path(f"{profile}.{2 * i}").read_text())) for i, cell in enumerate(cells, 1)]


def row_of(cell: Cell, counts: Counter[str]) -> Row:
    needed = cell.flops() / 2 / _LANES
    kinds = {kind: round(counts[kind] / needed, 3) for kind in [*KINDS, OTHER]}
    return cell.columns() | {"multiply_adds": round(needed), "all": round(counts.total() / needed, 3)} | kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE[,VALUE...]")
    parser.add_argument("--output", type=Path, default=RESULTS / "instructions_avx2.csv")
    parser.add_argument("--run", metavar="LIBRARY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_cells(cells_of(arguments.where), arguments.run)
        return
    with Table(arguments.output) as table:
        for cell, counts in count(arguments.where):
            row = row_of(cell, counts)
            table.add(row)
            shape = (cell.q_heads, cell.q_len, cell.k_len, cell.prefix_len, cell.head_dim)
            shares = ", ".join(f"{kind} {row[kind]}" for kind in [*KINDS, OTHER] if row[kind] >= 0.01)
            print(f"{cell.pass_:16} {shape} {'causal' if cell.is_causal else 'full':6} {row['all']:6.2f}: {shares}")


if __name__ == "__main__":
    main()
