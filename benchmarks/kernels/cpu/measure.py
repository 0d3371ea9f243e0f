"""Measurement of our kernels and every baseline on a CPU, over the cells of ``plan.py``.

A row of the CSV is written as soon as its cell is measured. It names the least work of the cell, FLOPs of the visible
pairs and bytes, the floor of its time on this machine (``ceilings.py`` says how; it takes its turns with the
contenders) and the fraction of it that we reach, ``of_floor``. ``cat`` is the fastest way with ``torch.cat``,
``alternative`` the fastest of the other ways in plain PyTorch. A decode pass begins with empty caches: what it reads
comes from DRAM. A baseline that takes seconds is timed once, by the call that compares its result with ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.cells import Cell, select
from benchmarks.common.contenders import Call, Contender, check_same, in_turns, make_dout, make_inputs, prepare
from benchmarks.common.table import Row, Table, ratios_to_ours, summary
from benchmarks.kernels.cpu.baselines import ALTERNATIVES, BASELINES, CAT, baselines_of, ours
from benchmarks.kernels.cpu.caches import CacheFlush
from benchmarks.kernels.cpu.ceilings import CeilingLoops, measure_ceilings
from benchmarks.kernels.cpu.goals import judge
from benchmarks.kernels.cpu.plan import one_of_each, plan

LEAST_ROUNDS = 3
# A baseline that takes longer is not called again.
SLOW_MS = 2000.0


def is_cold(cell: Cell) -> bool:
    """True if the caches are flushed before every call of the cell."""
    return cell.pass_ == "decode"


@dataclass
class WallTimer:
    """Milliseconds of calls, interleaved: every round takes each call once, in an order of its own."""

    before: Callable[[], None] | None = None  # called ahead of every call, in time that is not measured

    def __call__(self, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for names in in_turns(calls, rounds):
            for name in names:
                if self.before is not None:
                    self.before()
                begin_ns = time.perf_counter_ns()
                calls[name]()
                times[name].append((time.perf_counter_ns() - begin_ns) / 1e6)
        return times


def prepare_all(cell: Cell) -> tuple[dict[str, Call], dict[str, float]]:
    """The calls of all contenders, and the milliseconds of each one's first call.

    Raises:
        ValueError: a baseline computes something else than ours.
    """
    torch.manual_seed(0)
    inputs = make_inputs(cell, "cpu")
    dout = make_dout(inputs[0])
    calls: dict[str, Call] = {}
    first: dict[str, float] = {}

    def first_result(name: str, function: Contender) -> object:
        calls[name] = prepare(cell, function, inputs, dout)
        begin_ns = time.perf_counter_ns()
        result = calls[name]()
        first[name] = (time.perf_counter_ns() - begin_ns) / 1e6
        return result

    expected = first_result("ours", ours(cell))
    for name, function in baselines_of(cell).items():
        result = first_result(name, function)
        if cell.dropout_p:  # every contender drops elements of its own
            continue
        try:
            check_same(result, expected)
        except ValueError as error:
            raise ValueError(f"{name} {error} in {cell}") from None
    if cell.dropout_p:
        first_result("ours_without_dropout", ours(dataclasses.replace(cell, dropout_p=0.0)))
    return calls, first


def row_of(cell: Cell, times: dict[str, list[float]]) -> Row:
    """The CSV's row without the columns that all rows share."""
    milliseconds, ratios = statistics.median(times["ours"]), ratios_to_ours(times)
    floors = [max(both) for both in zip(times["floor_flops"], times["floor_bytes"], strict=True)]
    of_floor = statistics.median(floor / own for floor, own in zip(floors, times["ours"], strict=True))
    row: Row = {
        **cell.columns(),
        "flops": cell.flops(),
        "bytes": cell.bytes(),
        "cold": int(is_cold(cell)),
        "floor_ms": f"{statistics.median(floors):.4f}",
        "rounds": len(times["ours"]),
        "ours_ms": f"{milliseconds:.4f}",
        "ours_gflops": f"{cell.flops() / milliseconds / 1e6:.1f}",
        "ours_gbps": f"{cell.bytes() / milliseconds / 1e6:.1f}",
        "of_floor": f"{of_floor:.3f}",
    }
    for title, names in (("cat", CAT), ("alternative", ALTERNATIVES)):
        best = min((name for name in names if name in times), key=ratios.__getitem__, default="")
        row[title] = best
        row[f"{title}_ratio"] = f"{ratios[best]:.3f}" if best else ""
    for name in BASELINES:
        row[f"{name}_ms"] = f"{statistics.median(times[name]):.4f}" if name in times else ""
        row[f"{name}_ratio"] = f"{ratios[name]:.3f}" if name in times else ""
    without = ratios.get("ours_without_dropout")
    row["dropout_cost"] = f"{1 / without:.3f}" if without else ""
    return row


def line_of(row: Row) -> str:
    """The row as one line of text."""
    heads = f"{row['q_heads']}/{row['kv_heads']}"
    shape = f"{row['batch']},{heads},{row['q_len']},{row['k_len']},{row['prefix_len']},{row['head_dim']}"
    kind = "causal" if row["causal"] else "full"
    work = f"{float(row['flops']) / 1e9:8.3f} GFLOP {float(row['bytes']) / 1e6:7.2f} MB  floor {row['floor_ms']:>9} ms"
    speed = f"ours {row['ours_ms']:>9} ms = {float(row['of_floor']):4.0%} of it, {row['ours_gflops']:>6} GFLOP/s"
    others = "  ".join(
        f"{name} {row[f'{name}_ms']} ms {row[f'{name}_ratio']}x" for name in BASELINES if row[f"{name}_ms"]
    )
    dropout = f"  dropout costs {row['dropout_cost']}x" if row["dropout_cost"] else ""
    return f"{shape:26}{kind:7}{row['pass']:17}{work}  {speed}  {others}{dropout}"


def measure(cell: Cell, timer: WallTimer, rounds: int, seconds: float, loops: CeilingLoops) -> Row:
    """One row, of as many rounds as fit into ``seconds``, at least three."""
    calls, first = prepare_all(cell)
    calls |= loops.floors(cell.flops(), cell.bytes(), cell.dtype)
    slow = [name for name in calls if name in BASELINES and first[name] > SLOW_MS]
    quick = {name: call for name, call in calls.items() if name not in slow}
    begin = time.perf_counter()
    times = timer(quick, 1)
    rounds = max(LEAST_ROUNDS, min(rounds, int(seconds / (time.perf_counter() - begin))))
    for name, others in timer(quick, rounds - 1).items():
        times[name] += others
    return row_of(cell, {**times, **{name: [first[name]] * rounds for name in slow}})


def run(arguments: argparse.Namespace, shared: Row, output: Path | None) -> list[Row]:
    """Measure the plan, as far as ``arguments.time_limit`` seconds allow; returns the rows.

    Raises:
        SystemExit: ``arguments.where`` names no column, or a value that no cell has.
    """
    begin = time.monotonic()
    try:
        cells = select(plan(arguments.dtype), arguments.where)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if arguments.quick:
        cells = one_of_each(cells)
    loops = CeilingLoops(torch.get_num_threads())
    ceilings = measure_ceilings(loops, 4 if arguments.quick else 40)
    print(f"ceilings: {ceilings}", flush=True)
    if ceilings.matmul_gflops > ceilings.fma_gflops:
        print("torch.mm went beyond that: the processors are busy, or it has instructions that our kernels do not use.")
    rows: list[Row] = []
    warm, cold = WallTimer(), WallTimer(CacheFlush())
    with Table(output) as table:
        for done, cell in enumerate(cells):
            if arguments.time_limit and time.monotonic() - begin > arguments.time_limit:
                print(f"stopped by --time-limit after {done} of {len(cells)} cells")
                break
            timer = cold if is_cold(cell) else warm
            row = measure(cell, timer, arguments.rounds, 0.0 if arguments.quick else arguments.cell_seconds, loops)
            rows.append({**row, **ceilings.columns(), **shared})
            table.add(rows[-1])
            print(line_of(row), flush=True)
    print("\nBaselines' times over ours, geometric means:")
    print("\n".join(summary(rows, ("cat", "alternative", *BASELINES), ("pass", "causal"))))
    print("\nGoals:")
    print("\n".join(judge(rows)))
    print(f"\n{len(rows)} cells in {time.monotonic() - begin:.0f} s")
    return rows
