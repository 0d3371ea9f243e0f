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

Limits. A path need not be one that a call can take: branches on the same condition are chosen one by one. A predicated
instruction counts as executed. Instructions behind an indirect branch (a switch over dtypes) are not counted, those of
a called function by its best path. Counts are instructions, not cycles.

The table's rows of FlashAttention-2 were counted once, in the same way, from the sm_80 code of PyTorch 2.14.1's
libtorch_cuda.so: whole loops, which hold no seldom executed code. Its backward kernel forms five products in one pass;
ours form seven, four for columns and three for rows.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from .environment import BuildError, CudaToolkit, find_compiler, find_cuda_toolkit, parallel_jobs
from .extension import CUDA_FLAGS
from .sources import CUDA_SOURCES

CHECKOUT = Path(__file__).parent.parent
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
class Kernel:
    """A kernel's constants, as its header computes them.

    Attributes:
        name: ``forward``, ``decode``, ``backward columns`` or ``backward rows``.
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


# ---- the constants of the kernels' headers


_CONSTANTS = """
#include <cstdio>
#include "csrc/cuda/sm80/backward/columns.cuh"
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

template <int d, bool general, int blocks>
void forward() {
  using X = ForwardTraits<bfloat16, d, general, blocks>;
  print("forward", d, general, blocks, 0, 0, X::kThreads, X::kSharedBytes, 1, X::kColumns,
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
void all() {
  forward<d, false, 1>(); forward<d, true, 1>();
  if constexpr (d <= 128) forward<d, false, 2>();
  if constexpr (d <= 64) forward<d, true, 2>();
  decode<d, false>(); decode<d, true>();
  columns<d, true, d <= 128, false, false>(); columns<d, true, d <= 128, true, false>();
  columns<d, false, true, false, false>(); columns<d, false, true, true, false>();
  if constexpr (d <= 128) { columns<d, true, true, false, true>(); columns<d, true, true, true, true>(); }
  rows<d, false>(); rows<d, true>();
}
int main() { all<32>(); all<64>(); all<96>(); all<128>(); all<192>(); all<256>(); }
"""


def kernel_constants(toolkit: CudaToolkit) -> dict[tuple[str, ...], Kernel]:
    """Every kernel's constants by the arguments of its template: ``("forward", "128", "0", "2")``."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "constants.cu"), Path(folder, "constants")
        source.write_text(_CONSTANTS)
        compiler = [str(toolkit.home / "bin" / "nvcc"), "-ccbin", find_compiler()[0], "-std=c++20", f"-I{CHECKOUT}"]
        _run([*compiler, "-gencode=arch=compute_80,code=sm_80", str(source), "-o", str(program)])
        lines = _run([str(program)]).split("\n")
    kernels: dict[tuple[str, ...], Kernel] = {}
    for line in filter(None, lines):
        kind, d, a, b, c, e, *numbers = line.split()
        key: tuple[str, ...]
        on = [argument == "1" for argument in (a, b, c, e)]
        if kind == "forward":
            key, name, words = (
                (kind, d, a, b),
                "forward",
                ["general" if on[0] else "plain", f"{16 * int(b)} rows a warp"],
            )
        elif kind == "decode":
            key, name, words = (kind, d, a), "decode", ["wide" if on[0] else "narrow"]
        elif kind == "columns":
            sums = " ".join(word for word, wanted in zip(("dK", "dV"), on, strict=False) if wanted)
            key, name = (kind, d, a, b, c, e), "backward columns"
            words = ["general" if on[2] else "plain", sums, *(["delta"] if on[3] else [])]
        else:
            key, name, words = (kind, d, a), "backward rows", ["general" if on[0] else "plain"]
        kernels[key] = Kernel(name, int(d), ", ".join(words), *map(int, numbers))
    return kernels


def _template_arguments(symbol: str) -> tuple[str, ...] | None:
    """The key of `kernel_constants` for a mangled name; None for kernels without tensor cores."""
    kinds = {"forward_kernel": "forward", "decode_kernel": "decode", "backward_columns": "columns"}
    kinds["backward_rows"] = "rows"
    for function, kind in kinds.items():
        if f"{len(function)}{function}I" in symbol and "4sm80" in symbol:
            return kind, *(number for _, number in re.findall(r"L([ib])(\d+)E", symbol))
    return None


# ---- control flow


@dataclass
class Block:
    """Instructions that are executed together; ``successors`` are starts of blocks."""

    start: int
    opcodes: list[str] = field(default_factory=list)
    operands: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    calls: int | None = None  # first instruction of the function that the last instruction calls

    @cached_property
    def counts(self) -> Counts:
        text = list(zip(self.opcodes, self.operands, strict=True))
        return Counts(
            instructions=len(text),
            hmma=sum(opcode.startswith("HMMA") for opcode, _ in text),
            ldsm=sum(opcode.startswith("LDSM") for opcode, _ in text),
            copies=sum(opcode.startswith("LDGSTS") for opcode, _ in text),
            mask_loads=sum(opcode.startswith("LDG.E.U8") for opcode, _ in text),
            philox=sum(
                opcode.startswith("IMAD") and re.search("0x(d2511f53|2daee0ad|cd9e8d57|326172a9)", operand) is not None
                for opcode, operand in text
            ),
            divisions=sum(opcode.startswith("I2F") for opcode, _ in text),
            exponentials=sum(opcode == "MUFU.EX2" for opcode, _ in text),
        )


@dataclass(frozen=True)
class Counts:
    """Instructions on a path, and those of some kinds among them."""

    instructions: int = 0
    hmma: int = 0
    ldsm: int = 0
    copies: int = 0
    mask_loads: int = 0
    philox: int = 0
    divisions: int = 0
    exponentials: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def times(self, factor: int) -> Counts:
        return Counts(*(factor * value for value in self.values()))

    def values(self) -> tuple[int, ...]:
        return astuple(self)


@dataclass
class Loop:
    """A natural loop: its header, the blocks in it, the loops directly inside."""

    header: int
    blocks: set[int]
    latches: set[int]
    inner: list[Loop] = field(default_factory=list)


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse_functions(sass: str) -> dict[str, list[tuple[int, str, str, str]]]:
    """``(address, predicate, opcode, operands)`` of every instruction by function, from ``cuobjdump -sass``."""
    functions: dict[str, list[tuple[int, str, str, str]]] = {}
    current: list[tuple[int, str, str, str]] = []
    for line in sass.split("\n"):
        if "Function : " in line:
            current = functions.setdefault(line.split("Function : ")[1].strip(), [])
        elif found := _INSTRUCTION.search(line):
            address, predicate, opcode, operands = found.groups()
            current.append((int(address, 16), predicate or "", opcode, operands.strip()))
    return functions


def _branch_target(predicate: str, opcode: str, operands: str) -> int | None:
    """The address that a branch goes to. A conditional CALL.REL.NOINC is how ptxas leaves some loops."""
    leaves = bool(predicate) and opcode.startswith("CALL.REL.NOINC")
    if not leaves and (opcode.split(".")[0] not in ("BRA", "JMP") or opcode.startswith(("BRA.DIV", "BRA.CONV"))):
        return None
    return _address(operands)


def _address(operands: str) -> int:
    return int(operands.split("0x")[-1], 16)


def build_blocks(instructions: Sequence[tuple[int, str, str, str]]) -> dict[int, Block]:
    """The basic blocks of a function. Slow paths of divergent warps (BRA.DIV) are not followed."""
    addresses = [address for address, *_ in instructions]
    step = addresses[1] - addresses[0]
    starts = {addresses[0]}
    for address, predicate, opcode, operands in instructions:
        if (target := _branch_target(predicate, opcode, operands)) is not None:
            starts |= {target, address + step}
        elif opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMX", "KILL"):
            starts.add(address + step)
        elif opcode.startswith("CALL.REL"):
            starts |= {_address(operands), address + step}
    blocks: dict[int, Block] = {}
    block = Block(addresses[0])
    last = ("", "", "")
    for address, predicate, opcode, operands in instructions:
        if address in starts and address != block.start:
            if not block.successors and not _ends(*last[:2]):
                block.successors.append(address)
            block = Block(address)
        blocks.setdefault(block.start, block)
        block.opcodes.append(opcode)
        block.operands.append(operands)
        last = (predicate, opcode, operands)
        if (target := _branch_target(predicate, opcode, operands)) is not None:
            conditional = bool(predicate) or re.search(r"\bU?P\d", operands) is not None
            block.successors = [target, *([address + step] if conditional else [])]
        elif opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMX", "KILL") and predicate:
            block.successors = [address + step]
        elif opcode.startswith("CALL.REL"):
            block.calls = _address(operands)
    return blocks


def _ends(predicate: str, opcode: str) -> bool:
    return not predicate and opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMX", "KILL")


def find_loops(blocks: dict[int, Block]) -> list[Loop]:
    """The outermost natural loops of the blocks that the first one reaches."""
    entry = min(blocks)
    order: list[int] = []
    seen = {entry}
    stack = [(entry, iter(blocks[entry].successors))]
    while stack:
        start, successors = stack[-1]
        following = next((s for s in successors if s in blocks and s not in seen), None)
        if following is None:
            order.append(start)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    order.reverse()
    predecessors: dict[int, list[int]] = {start: [] for start in order}
    for start in order:
        for successor in blocks[start].successors:
            if successor in predecessors:
                predecessors[successor].append(start)
    # Dominators by the usual iteration; a function has a few hundred blocks.
    number = {start: i for i, start in enumerate(order)}
    parent = {entry: entry}

    def common(a: int, b: int) -> int:
        while a != b:
            while number[a] > number[b]:
                a = parent[a]
            while number[b] > number[a]:
                b = parent[b]
        return a

    changed = True
    while changed:
        changed = False
        for start in order[1:]:
            known = [p for p in predecessors[start] if p in parent]
            dominator = known[0]
            for other in known[1:]:
                dominator = common(dominator, other)
            if parent.get(start) != dominator:
                parent[start] = dominator
                changed = True

    def dominates(a: int, b: int) -> bool:
        while number[b] > number[a]:
            b = parent[b]
        return a == b

    loops: dict[int, Loop] = {}
    for start in order:
        for successor in blocks[start].successors:
            if successor in number and dominates(successor, start):
                loop = loops.setdefault(successor, Loop(successor, {successor}, set()))
                loop.latches.add(start)
                waiting = [start]
                while waiting:
                    member = waiting.pop()
                    if member not in loop.blocks:
                        loop.blocks.add(member)
                        waiting += predecessors[member]
    outermost: list[Loop] = []
    by_size = sorted(loops.values(), key=lambda loop: len(loop.blocks))
    for i, loop in enumerate(by_size):
        outer = next((other for other in by_size[i + 1 :] if loop.header in other.blocks), None)
        (outer.inner if outer else outermost).append(loop)
    return outermost


def hot_loops(blocks: dict[int, Block], loops: Iterable[Loop]) -> Iterator[tuple[Loop, Loop | None]]:
    """The innermost loops with tensor core instructions, each with the loop around it."""

    def walk(loop: Loop, outer: Loop | None) -> Iterator[tuple[Loop, Loop | None]]:
        inside = [pair for each in loop.inner for pair in walk(each, loop)]
        if inside:
            yield from inside
        elif any(blocks[start].counts.hmma for start in loop.blocks):
            yield loop, outer

    for loop in loops:
        yield from walk(loop, None)


@dataclass(frozen=True)
class Walker:
    """Finds the path of one kind through the loops of one kernel."""

    blocks: dict[int, Block]
    kernel: Kernel
    path: str

    def merit(self, counts: Counts) -> tuple[int, ...]:
        """Lexicographic merit of a path; the best path has the greatest."""
        wanted = 0
        if self.path == "dropout":
            wanted = counts.philox
        elif self.path == "mask":
            wanted = counts.mask_loads
        elif self.path == "padding":
            wanted = min(counts.mask_loads, 1) if self.kernel.name == "forward" else counts.mask_loads
        elif self.path == "several prefixes":
            wanted = counts.divisions
        return counts.hmma, min(counts.exponentials, self.kernel.scores), wanted, counts.copies, -counts.instructions

    def of_block(self, start: int, in_hot_loop: bool) -> Counts:
        """Counts of one block and of the function that it calls."""
        block = self.blocks[start]
        counts = block.counts
        if in_hot_loop and self.kernel.name == "forward":
            counts = replace(counts, divisions=0)
        if block.calls is not None:
            counts += self.of_function(block.calls)
        return counts

    def of_function(self, start: int) -> Counts:
        """Counts of the best path from a function's first instruction to its return; none if it has loops."""
        best: dict[int, Counts | None] = {}

        def visit(node: int) -> Counts | None:
            if node not in best:
                best[node] = None
                block = self.blocks[node]
                if block.opcodes[-1].startswith("RET"):
                    best[node] = block.counts
                elif ways := [rest for s in block.successors if (rest := visit(s)) is not None]:
                    best[node] = block.counts + max(ways, key=self.merit)
            return best[node]

        return visit(start) or Counts()

    def trips(self, loop: Loop) -> int:
        """Iterations of a loop inside the hot one, for a full tile."""
        counts = [self.blocks[start].counts for start in loop.blocks]
        if any(each.hmma for each in counts):
            return self.kernel.stage_trips
        if any(each.copies for each in counts):
            return self.kernel.copy_trips
        if any(each.mask_loads for each in counts):
            return self.kernel.mask_trips
        return 1

    def iteration(self, loop: Loop) -> Counts:
        """Counts of the best path from the header of ``loop`` back to it."""
        inner_of = {start: inner for inner in loop.inner for start in inner.blocks}
        is_hot = any(self.blocks[start].counts.hmma for start in loop.blocks)
        best: dict[int, Counts] = {}

        def visit(node: int) -> Counts | None:
            """Counts from ``node`` (a block's start, or an inner loop's header) to a latch."""
            if node in best:
                return best[node]
            inner = inner_of.get(node)
            if inner is None:
                here, members = self.of_block(node, is_hot), {node}
            else:
                here, members = self.iteration(inner).times(self.trips(inner)), inner.blocks
            ways: list[Counts] = []
            for member in members:
                for successor in self.blocks[member].successors:
                    if successor == loop.header:
                        ways.append(Counts())
                    elif successor in loop.blocks and successor not in members:
                        target = inner_of[successor].header if successor in inner_of else successor
                        if (rest := visit(target)) is not None:
                            ways.append(rest)
            if not ways:
                return None
            best[node] = here + max(ways, key=self.merit)
            return best[node]

        counts = visit(loop.header)
        assert counts is not None, f"the loop at {loop.header:#x} has no way back"
        return counts


# ---- the report


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
        functions = parse_functions(_run([cuobjdump, "-sass", *arch, str(target)]))
        usage = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", _run([cuobjdump, "-res-usage", *arch, str(target)])))
        for symbol, instructions in sorted(functions.items()):
            key = _template_arguments(symbol)
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


def find_cuobjdump(toolkit: CudaToolkit) -> str:
    """The disassembler of the toolkit, of triton's wheel, or of PATH.

    Raises:
        BuildError: there is none.
    """
    candidates = [toolkit.home / "bin" / "cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((str(path) for path in candidates if path.is_file()), None) or shutil.which("cuobjdump")
    if found is None:
        raise BuildError("cuobjdump was not found: install the CUDA toolkit's, or run `pip install triton`.")
    return found


def report_sources() -> list[str]:
    """The .cu files whose kernels the report counts."""
    return [source for source in CUDA_SOURCES if "/sm80/" in source and "_bfloat16_" in source]


def compile_source(toolkit: CudaToolkit, source: str, architectures: Iterable[str], folder: Path) -> Path:
    """Compile one file with the flags of the build."""
    target = folder / (Path(source).stem + ".o")
    numbers = [architecture.replace(".", "") for architecture in architectures]
    command = [str(toolkit.home / "bin" / "nvcc"), "-ccbin", find_compiler()[0], *CUDA_FLAGS]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    _run([*command, "-c", source, "-o", str(target)])
    return target


def read_table() -> list[dict[str, str]]:
    """The committed table, FlashAttention-2's rows included."""
    with TABLE.open() as file:
        return list(csv.DictReader(file))


def _run(command: list[str]) -> str:
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise BuildError(f"`{command[0]}` failed: {run.stdout}{run.stderr}")
    return run.stdout


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
        order = ["forward", "decode", "backward columns", "backward rows", "backward"]
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
