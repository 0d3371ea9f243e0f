"""Time the two backends of ``prefix_attention`` on this CPU against each other and against ``torch.cat`` + SDPA.

    python benchmarks/kernels/cpu/bench_backends.py                    # float32, two threads
    python benchmarks/kernels/cpu/bench_backends.py --dtype bfloat16 --cell-seconds 1

The cells are those of ``bench_attention.py`` that both backends can serve. Every round times each contender once, in
one process and in turns. ``split_ratio`` and ``cat_ratio`` are medians over the rounds of their time over that of the
fused kernels: above 1, the fused kernels are faster. The rows of ``"auto"`` for CPUs rest on this table.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.cells import Cell, select
from benchmarks.common.contenders import check_same, make_dout, make_inputs, prepare
from benchmarks.common.environment import environment
from benchmarks.common.options import attention_parser, output_of
from benchmarks.common.table import RESULTS, Row, Table, ratios_to_ours, summary
from benchmarks.kernels.cpu.baselines import CAT, baselines_of
from benchmarks.kernels.cpu.measure import WallTimer
from benchmarks.kernels.cpu.plan import PASSES, one_of_each, plan
from prefix_kernels import explain, prefix_attention

LEAST_ROUNDS = 3
SHAPE = ("batch", "q_heads", "kv_heads", "q_len", "prefix_len", "head_dim")


def measure(cell: Cell, rounds: int, seconds: float) -> Row:
    """One row, of as many rounds as fit into ``seconds``, at least three."""
    torch.manual_seed(0)
    inputs = make_inputs(cell, "cpu")
    dout = make_dout(inputs[0])
    ours = functools.partial(prefix_attention, is_causal=cell.is_causal)
    cat = next(function for name, function in baselines_of(cell).items() if name in CAT)
    contenders = {"ours": functools.partial(ours, backend="fused"), "split": functools.partial(ours, backend="split")}
    calls = {name: prepare(cell, function, inputs, dout) for name, function in {**contenders, "cat": cat}.items()}
    expected = calls["ours"]()
    for name in ("split", "cat"):
        check_same(calls[name](), expected)
    timer, begin = WallTimer(), time.perf_counter()
    times = timer(calls, 1)
    rounds = max(LEAST_ROUNDS, min(rounds, int(seconds / (time.perf_counter() - begin))))
    for name, others in timer(calls, rounds - 1).items():
        times[name] += others
    ratios = ratios_to_ours(times)
    row: Row = {**cell.columns(), "rounds": rounds, "fused_ms": f"{statistics.median(times['ours']):.4f}"}
    for name, ratio in ratios.items():
        row |= {f"{name}_ms": f"{statistics.median(times[name]):.4f}", f"{name}_ratio": f"{ratio:.3f}"}
    return row | {"split_prefix": explain(*inputs, is_causal=cell.is_causal, backend="split").prefix}


def run(arguments: argparse.Namespace, output: Path | None) -> None:
    """Measure the cells asked for.

    Raises:
        SystemExit: ``arguments.where`` names no column, or a value that no cell has.
    """
    try:
        cells = select([cell for cell in plan(arguments.dtype) if cell.pass_ in PASSES], arguments.where)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    shared, rows = environment("cpu"), []
    with Table(output) as table:
        for cell in one_of_each(cells) if arguments.quick else cells:
            row = measure(cell, arguments.rounds, 0.0 if arguments.quick else arguments.cell_seconds)
            rows.append({**row, **shared})
            table.add(rows[-1])
            shape = ",".join(str(row[name]) for name in SHAPE)
            kind = "causal" if cell.is_causal else "full"
            print(f"{shape:24}{kind:8}{cell.pass_:17}{row['fused_ms']:>10} ms  split {row['split_ratio']}x", end="")
            print(f"  cat {row['cat_ratio']}x", flush=True)
    print("\nTimes over those of the fused kernels, geometric means:")
    print("\n".join(summary(rows, ("split", "cat"), ("pass", "causal"))))


def main() -> None:
    parser = attention_parser(__doc__, dtype="float32")
    parser.add_argument("--cell-seconds", type=float, default=1.5, help="for the rounds of a cell")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    isa = torch.ops.prefix_kernels.cpu_isa()
    run(arguments, output_of(arguments, RESULTS / f"backends_cpu_{isa}_{arguments.dtype}.csv"))


if __name__ == "__main__":
    main()
