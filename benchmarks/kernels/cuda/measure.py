"""Measurement of our kernels and every baseline on a GPU, over the cells of ``plan.py``.

``ours`` is the backend ``"fused"`` of ``prefix_attention``; its backend ``"split"`` is one of the others. A row of the
CSV is written as soon as its cell is measured, so that a run that is cut off leaves what it has. ``best`` is the
fastest baseline, ``best_ratio`` its time over ours; fractions are of the matrix product and the copy that this GPU was
measured to reach in the same run. A baseline that refuses a cell, or computes something else than ours, is left out of
its row and named with the reason.
"""

from __future__ import annotations

import argparse
import functools
import re
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.common.cells import Cell, select
from benchmarks.common.contenders import Call, check_same, make_dout, make_inputs, prepare
from benchmarks.common.table import RESULTS, Row, Table, ratios_to_ours, summary
from benchmarks.kernels.cuda.baselines import BASELINES
from benchmarks.kernels.cuda.ceilings import GpuCeilings, measure_ceilings
from benchmarks.kernels.cuda.plan import plan
from benchmarks.kernels.cuda.timing import EventTimer, Timer, peak_memory
from prefix_kernels import prefix_attention

NAMES = ("ours", *BASELINES)
# A call that takes longer is repeated less often.
_TARGET_MS = 300.0


def prepare_all(cell: Cell, device: str, flex: bool = False) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls of all contenders that accept the cell, warmed up, and the reasons of those that refuse it."""
    torch.manual_seed(0)
    inputs = make_inputs(cell, device)
    dout = make_dout(inputs[0])
    fused = functools.partial(prefix_attention, is_causal=cell.is_causal, backend="fused")
    ours = prepare(cell, fused, inputs, dout)
    expected = ours()
    calls, refused = {"ours": ours}, {}
    for name, make in BASELINES.items():
        if name == "cat_flex" and not flex:
            continue
        try:
            call = prepare(cell, make(cell, device), inputs, dout)
            check_same(call(), expected)
            calls[name] = call
        except Exception as error:  # each backend has errors of its own
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    del expected
    for _ in range(2):  # and once above
        for call in calls.values():
            call()
    return calls, refused


def row_of(cell: Cell, times: dict[str, list[float]], memory: dict[str, float], ceilings: GpuCeilings) -> Row:
    """The CSV's row without the columns that all rows share."""
    ours = median(times["ours"])
    tflops, gbps = cell.flops() / ours / 1e9, cell.bytes() / ours / 1e6
    ratios = ratios_to_ours(times)
    best = min(ratios, key=ratios.__getitem__, default="")
    row: Row = {
        **cell.columns(),
        "ours_ms": f"{ours:.4f}",
        "ours_tflops": f"{tflops:.1f}",
        "ours_gbps": f"{gbps:.0f}",
        "of_matrix_ceiling": f"{tflops / ceilings.tflops:.3f}",
        "of_copy_ceiling": f"{gbps / ceilings.gbps:.3f}",
        "best": best,
        "best_ratio": f"{ratios[best]:.3f}" if best else "",
    }
    for name in BASELINES:
        row[f"{name}_ms"] = f"{median(times[name]):.4f}" if name in times else ""
        row[f"{name}_ratio"] = f"{ratios[name]:.3f}" if name in times else ""
    for name in NAMES:
        row[f"{name}_peak_mib"] = f"{memory[name]:.1f}" if name in memory else ""
    return row


def line_of(row: Row) -> str:
    """The row as one line of text."""
    shape = ",".join(str(row[name]) for name in ("batch", "q_heads", "kv_heads", "head_dim", "q_len", "k_len"))
    kind = "causal" if row["causal"] else "full"
    speed = f"{row['ours_ms']:>9} ms {row['ours_tflops']:>6} TFLOP/s {row['ours_gbps']:>5} GB/s"
    fractions = f"{float(row['of_matrix_ceiling']):4.0%} of matmul {float(row['of_copy_ceiling']):4.0%} of copy"
    best = f"{row['best_ratio']}x {row['best']}" if row["best"] else "no baseline"
    return f"{shape:28} P={row['prefix_len']:<5}{kind:7}{row['pass']:17}{speed}  {fractions}  {best}"


def measure(cell: Cell, device: str, timer: Timer, rounds: int, ceilings: GpuCeilings, flex: bool = False) -> Row:
    """One row; baselines that refuse the cell are named with their reason."""
    calls, refused = prepare_all(cell, device, flex)
    for name, reason in refused.items():
        print(f"  without {name}: {reason}")
    once = timer(calls, 1)
    rounds = max(3, min(rounds, int(_TARGET_MS / sum(map(median, once.values())))))
    times = timer(calls, rounds)
    memory = {}
    if cell.pass_ == "forward_backward" and device == "cuda":
        memory = {name: peak_memory(call) for name, call in calls.items()}
    return row_of(cell, times, memory, ceilings)


def default_output(dtype: str) -> Path:
    """A file of ``results`` that is named after the GPU."""
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
    return RESULTS / f"attention_{name}_{dtype}.csv"


def run(
    arguments: argparse.Namespace,
    shared: Row,
    output: Path | None,
    timer: Timer | None = None,
    ceilings: GpuCeilings | None = None,
    device: str = "cuda",
) -> list[Row]:
    """Measure the plan, as far as ``arguments.time_limit`` seconds allow; returns the rows.

    Raises:
        SystemExit: ``arguments.where`` names no column, or a value that no cell has; or our kernels failed in some
            cell, which ends the run only if the GPU is of no more use.
    """
    begin = time.monotonic()
    try:
        cells = select(plan(arguments.dtype), arguments.where)[: 4 if arguments.quick else None]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    timer = EventTimer() if timer is None else timer
    ceilings = measure_ceilings(timer, getattr(torch, arguments.dtype)) if ceilings is None else ceilings
    shared = {**shared, "matmul_tflops": f"{ceilings.tflops:.1f}", "copy_gbps": f"{ceilings.gbps:.0f}"}
    print(f"ceilings: {ceilings.tflops:.0f} TFLOP/s of a matrix product, {ceilings.gbps:.0f} GB/s of a copy")
    rows: list[Row] = []
    failures = 0
    with Table(output) as table:
        for done, cell in enumerate(cells):
            if arguments.time_limit and time.monotonic() - begin > arguments.time_limit:
                print(f"stopped by --time-limit after {done} of {len(cells)} cells")
                break
            try:
                row = {**measure(cell, device, timer, arguments.rounds, ceilings, arguments.flex), **shared}
            except torch.cuda.OutOfMemoryError:
                print(f"{cell}: left out, the GPU's memory is too small")
                continue
            except Exception as error:
                failures += 1
                print(f"{cell}: FAILED: {error}", flush=True)
                if device == "cuda":
                    torch.cuda.synchronize()  # raises where the GPU is of no more use to this process
                continue
            rows.append(row)
            table.add(row)
            print(line_of(row), flush=True)
    print("\nBaselines' times over ours, geometric means:")
    print("\n".join(summary(rows, ("best", *BASELINES), ("pass",))))
    if failures:
        raise SystemExit(f"{failures} cells failed")
    return rows
