"""Counts the machine instructions of the CUDA kernels: per kernel, architecture and path of its hot loop.

    python -m build_tools.sass_report                 compile for 8.0, 8.6 and 9.0, print the table
    python -m build_tools.sass_report --write         write tests/cuda/sass_report.csv anew
    python -m build_tools.sass_report --arch 9.0 backward_bfloat16_128

Only bfloat16 is counted: float16 kernels differ from it in the type of an instruction. The script needs nvcc, and
cuobjdump from the toolkit, from PATH or from triton's wheel.

The hot loop of a kernel is its innermost loop that contains tensor core instructions (HMMA). A *path* is a way from the
loop's first instruction back to it, an inner loop counted as often as a full tile makes it run. Of all paths the report
takes those with the most HMMA, which visit a full tile, and of these:

    plain             an exponential (MUFU.EX2) for every score, most copies by cp.async (LDGSTS), then fewest
                      instructions: a tile that every query sees, without options, of aligned rows of the kernel's type
    padding           plain, through loads of a boolean mask [batch, 1, 1, columns]
    mask              plain, through loads of a boolean mask for each score; for decode and backward this is padding too
    dropout           plain, through the multiplications of Philox
    several prefixes  plain, through the integer divisions that find a column's prefix; in the forward pass those of the
                      loops that copy rows, because a tile of whole prefixes is visible to every query

Only general kernels have the middle three, and their plain path is that of a general kernel whose options are all off.
Dropout kernels of the forward pass have dropout alone; their plain path is a tile that no row sees.

Limits. A path need not be one that a call can take: branches on the same condition are chosen one by one. A predicated
instruction counts as executed. Instructions behind an indirect branch (a switch over dtypes) are not counted, those of
a called function by its best path. Counts are instructions, not cycles.

The table's rows of FlashAttention-2 were counted once, in the same way, from the sm_80 code of PyTorch 2.14.1's
libtorch_cuda.so: whole loops, which hold no seldom executed code. Its backward kernel forms five products in one pass,
as does ours of that name; those for columns and for rows form seven together, four and three.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .environment import BuildError, find_cuda_toolkit, parallel_jobs
from .sass.control_flow import Counts, build_blocks, find_loops, hot_loops, parse_functions
from .sass.kernels import Kernel, kernel_constants, template_arguments
from .sass.paths import Walker
from .sass.tools import CHECKOUT, compile_source, find_cuobjdump, run
from .sources import CUDA_SOURCES

TABLE = CHECKOUT / "tests" / "cuda" / "sass_report.csv"
ARCHITECTURES = ("8.0", "8.6", "9.0")
PATHS = ("plain", "padding", "mask", "dropout", "several prefixes")


@dataclass(frozen=True)
class Multiprocessor:
    """Resources that the blocks of one multiprocessor share."""

    shared_bytes: int
    threads: int
    registers: int = 65536
    reserved_bytes: int = 1024  # shared memory that the driver keeps, per block


MULTIPROCESSORS = {
    "8.0": Multiprocessor(164 * 1024, 2048),
    "8.6": Multiprocessor(100 * 1024, 1536),
    "9.0": Multiprocessor(228 * 1024, 2048),
}


@dataclass(frozen=True)
class Row:
    """A line of the table. ``stage`` counts the loop around the hot one too, per HMMA."""

    source: str
    kernel: str
    head_dim: int
    variant: str
    architecture: str
    path: str
    instructions: int
    hmma: int
    ldsm: int
    per_hmma: str
    ldsm_per_hmma: str
    stage_per_hmma: str
    kernel_instructions: int
    registers: int
    shared_bytes: int
    blocks_per_sm: int


def blocks_per_sm(architecture: str, threads: int, registers: int, shared_bytes: int) -> int:
    """The blocks that fit on a multiprocessor. Registers are given to warps in units of 256."""
    sm = MULTIPROCESSORS[architecture]
    warps = (threads + 31) // 32
    by_registers = sm.registers // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, sm.shared_bytes // (shared_bytes + sm.reserved_bytes), sm.threads // threads)


def report_object(
    cuobjdump: str, target: Path, kernels: dict[tuple[str, ...], Kernel], architectures: Iterable[str]
) -> list[Row]:
    """The rows of every tensor core kernel in an object."""
    rows: list[Row] = []
    for architecture in architectures:
        arch = ["-arch", f"sm_{architecture.replace('.', '')}"]
        functions = parse_functions(run([cuobjdump, "-sass", *arch, str(target)]))
        usage = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", run([cuobjdump, "-res-usage", *arch, str(target)])))
        for symbol, instructions in sorted(functions.items()):
            key = template_arguments(symbol)
            if key is not None:
                registers = int(usage[symbol])
                rows += _report_kernel(kernels[key], instructions, registers, architecture)
    return sorted(
        rows, key=lambda row: (row.kernel, row.head_dim, row.variant, row.architecture, PATHS.index(row.path))
    )


def _report_kernel(
    kernel: Kernel, instructions: list[tuple[int, str, str, str]], registers: int, architecture: str
) -> Iterator[Row]:
    blocks = build_blocks(instructions)
    loops = list(hot_loops(blocks, find_loops(blocks)))
    assert loops, f"{kernel}: no loop with HMMA"
    known: list[Counts] = []
    for path in PATHS:
        walker = Walker(blocks, kernel, path)
        hot, outer = max(loops, key=lambda pair: walker.merit(walker.iteration(pair[0])))
        counts = walker.iteration(hot)
        if known and (counts in known or walker.merit(counts)[2] == 0):
            continue
        known.append(counts)
        stage = counts
        if outer is not None and kernel.name != "forward":
            stage = walker.iteration(outer)
        yield Row(
            "ours",
            kernel.name,
            kernel.head_dim,
            kernel.variant,
            architecture,
            path,
            counts.instructions,
            counts.hmma,
            counts.ldsm,
            f"{counts.instructions / counts.hmma:.2f}",
            f"{counts.ldsm / counts.hmma:.2f}",
            f"{stage.instructions / stage.hmma:.2f}",
            len(instructions),
            registers,
            kernel.shared_bytes,
            blocks_per_sm(architecture, kernel.threads, registers, kernel.shared_bytes),
        )


def report_sources() -> list[str]:
    """The .cu files whose kernels the report counts."""
    return [source for source in CUDA_SOURCES if "/sm80/" in source and "_bfloat16_" in source]


def read_table() -> list[dict[str, str]]:
    """The committed table, FlashAttention-2's rows included."""
    with TABLE.open() as file:
        return list(csv.DictReader(file))


def _write_table(rows: list[dict[str, str]]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _print(rows: list[dict[str, str]]) -> None:
    columns = list(Row.__dataclass_fields__)
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(row[column].ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, count, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", nargs="*", help="only files with one of these words in their path")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all three")
    parser.add_argument("--objects", type=Path, help="folder of objects, compiled for the architectures already")
    parser.add_argument("--write", action="store_true", help=f"replace what was counted in {TABLE.name}")
    options = parser.parse_args(arguments)
    architectures = options.arch or list(ARCHITECTURES)
    toolkit = find_cuda_toolkit()
    if toolkit is None:
        raise BuildError("no CUDA toolkit was found: nvcc is neither on PATH nor in CUDA_HOME.")
    cuobjdump, kernels = find_cuobjdump(toolkit), kernel_constants(toolkit)
    sources = [s for s in report_sources() if not options.part or any(part in s for part in options.part)]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(parallel_jobs()) as pool:

        def count(source: str) -> list[Row]:
            if options.objects is not None:
                target = options.objects / (Path(source).stem + ".o")
            else:
                target = compile_source(toolkit, source, architectures, Path(temporary))
            return report_object(cuobjdump, target, kernels, architectures)

        counted = [row for rows in pool.map(count, sources) for row in rows]
    rows = [{name: str(getattr(row, name)) for name in Row.__dataclass_fields__} for row in counted]
    _print(rows)
    if options.write:
        identity = ("source", "kernel", "head_dim", "variant", "architecture", "path")
        new = {tuple(row[name] for name in identity): row for row in rows}
        known = {tuple(row[name] for name in identity[:5]) for row in rows}
        old = read_table() if TABLE.is_file() else []
        kept = [row for row in old if tuple(row[name] for name in identity[:5]) not in known]
        order = ["forward", "decode", "backward columns", "backward rows", "backward one pass", "backward"]
        _write_table(
            sorted(
                [*kept, *new.values()],
                key=lambda row: (
                    order.index(row["kernel"]),
                    int(row["head_dim"]),
                    row["source"] == "FlashAttention-2",
                    row["variant"],
                    row["architecture"],
                    PATHS.index(row["path"]),
                ),
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
