"""``bench_attention.py --device cuda``: our kernels and every baseline over the cells of ``cuda_cells.py``.

A row of the CSV is written as soon as its cell is measured, so that a run that is cut off leaves what it has. ``best``
is the fastest baseline, ``best_ratio`` its time over ours; fractions are of the matrix product and the copy that this
GPU was measured to reach in the same run.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cuda_baselines
import torch
from cuda_cells import CudaCell, plan
from cuda_timing import Ceilings, EventTimer, Timer, measure_ceilings, median, peak_memory
from torch import Tensor

from prefix_kernels import prefix_attention

NAMES = ("ours", *cuda_baselines.NAMES)
# A call that takes longer is repeated less often.
_TARGET_MS = 300.0


def make_inputs(cell: CudaCell, device: str) -> list[Tensor]:
    """The operands, laid out as a model's projections leave them: ``[B, S, H, D]`` in memory."""
    dtype = getattr(torch, cell.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    query = normal(cell.batch, cell.q_len, cell.q_heads, cell.head_dim).transpose(1, 2)
    keys = [normal(cell.batch, cell.k_len, cell.kv_heads, cell.head_dim).transpose(1, 2) for _ in range(2)]
    prefix = [normal(cell.kv_heads, cell.prefix_len, cell.head_dim) for _ in range(2)]
    return [query, *keys, *prefix]


def prepare(
    cell: CudaCell, function: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor
) -> Callable[[], object]:
    """What one timed call of the contender is."""
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, cell.needs, strict=True)]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if not asked:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*leaves)

        return forward
    if cell.pass_ == "forward_backward":
        return lambda: torch.autograd.grad(function(*leaves), asked, dout)
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, asked, dout, retain_graph=True)


def prepare_all(
    cell: CudaCell, device: str, flex: bool = False
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The calls of all contenders that accept the cell, warmed up, and why the others do not."""
    torch.manual_seed(0)
    inputs = make_inputs(cell, device)
    dout = torch.randn_like(inputs[0].transpose(1, 2)).transpose(1, 2)
    makers: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "ours": lambda: lambda *tensors: prefix_attention(*tensors, is_causal=cell.is_causal)
    }
    makers |= cuda_baselines.makers(cell, device)
    if not flex:
        del makers["cat_flex"]
    calls, refused = {}, {}
    for name, make in makers.items():
        try:
            call = prepare(cell, make(), inputs, dout)
            for _ in range(3):
                call()
            calls[name] = call
        except Exception as error:  # each backend has errors of its own
            if name == "ours":
                raise
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return calls, refused


def row_of(
    cell: CudaCell, times: dict[str, list[float]], memory: dict[str, float], ceilings: Ceilings
) -> dict[str, object]:
    """The CSV's row without what all rows share."""
    ours = median(times["ours"])
    tflops, gbps = cell.flops() / ours / 1e9, cell.bytes() / ours / 1e6
    ratios = {
        name: median([theirs / own for theirs, own in zip(times[name], times["ours"], strict=True)])
        for name in times
        if name != "ours"
    }
    best = min(ratios, key=ratios.__getitem__, default="")
    row: dict[str, object] = {
        "batch": cell.batch,
        "q_heads": cell.q_heads,
        "kv_heads": cell.kv_heads,
        "head_dim": cell.head_dim,
        "q_len": cell.q_len,
        "k_len": cell.k_len,
        "prefix_len": cell.prefix_len,
        "dtype": cell.dtype,
        "causal": int(cell.is_causal),
        "pass": cell.pass_,
        "ours_ms": f"{ours:.4f}",
        "ours_tflops": f"{tflops:.1f}",
        "ours_gbps": f"{gbps:.0f}",
        "of_matrix_ceiling": f"{tflops / ceilings.tflops:.3f}",
        "of_copy_ceiling": f"{gbps / ceilings.gbps:.3f}",
        "best": best,
        "best_ratio": f"{ratios[best]:.3f}" if best else "",
    }
    for name in cuda_baselines.NAMES:
        row[f"{name}_ms"] = f"{median(times[name]):.4f}" if name in times else ""
        row[f"{name}_ratio"] = f"{ratios[name]:.3f}" if name in times else ""
    for name in NAMES:
        row[f"{name}_peak_mib"] = f"{memory[name]:.1f}" if name in memory else ""
    return row


def line_of(row: dict[str, object]) -> str:
    """The row as one line of text."""
    shape = ",".join(str(row[name]) for name in ("batch", "q_heads", "kv_heads", "head_dim", "q_len", "k_len"))
    kind = "causal" if row["causal"] else "full"
    speed = f"{row['ours_ms']:>9} ms {row['ours_tflops']:>6} TFLOP/s {row['ours_gbps']:>5} GB/s"
    fractions = f"{float(row['of_matrix_ceiling']):4.0%} of matmul {float(row['of_copy_ceiling']):4.0%} of copy"
    best = f"{row['best_ratio']}x {row['best']}" if row["best"] else "no baseline"
    return f"{shape:28} P={row['prefix_len']:<5}{kind:7}{row['pass']:17}{speed}  {fractions}  {best}"


def summary(rows: Iterable[dict[str, object]]) -> list[str]:
    """Per pass: geometric mean and lowest of the ratios to every baseline and to the best one."""
    rows = list(rows)
    lines = []
    for pass_ in dict.fromkeys(str(row["pass"]) for row in rows):
        chosen = [row for row in rows if row["pass"] == pass_]
        for name in ("best", *cuda_baselines.NAMES):
            ratios = [float(row[f"{name}_ratio"]) for row in chosen if row[f"{name}_ratio"]]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                lines.append(f"{pass_:17}{mean:6.2f}x {name:13} (lowest {min(ratios):.2f}x, {len(ratios)} cells)")
    return lines


def measure(
    cell: CudaCell, device: str, timer: Timer, rounds: int, ceilings: Ceilings, flex: bool = False
) -> dict[str, object]:
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


def run(
    arguments: argparse.Namespace,
    shared: dict[str, object],
    output: Path | None,
    timer: Timer | None = None,
    ceilings: Ceilings | None = None,
    device: str = "cuda",
) -> list[dict[str, object]]:
    """Measure the plan, or what of it fits into ``arguments.time_limit`` seconds; returns the rows."""
    begin = time.monotonic()
    cells = plan(arguments.dtype)[: 4 if arguments.quick else None]
    timer = EventTimer() if timer is None else timer
    ceilings = measure_ceilings(timer, getattr(torch, arguments.dtype)) if ceilings is None else ceilings
    shared = {**shared, "matmul_tflops": f"{ceilings.tflops:.1f}", "copy_gbps": f"{ceilings.gbps:.0f}"}
    print(f"ceilings: {ceilings.tflops:.0f} TFLOP/s of a matrix product, {ceilings.gbps:.0f} GB/s of a copy")
    rows: list[dict[str, object]] = []
    file = None
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.open("w", newline="")
    try:
        for done, cell in enumerate(cells):
            if arguments.time_limit and time.monotonic() - begin > arguments.time_limit:
                print(f"stopped by --time-limit after {done} of {len(cells)} cells")
                break
            try:
                row = {**measure(cell, device, timer, arguments.rounds, ceilings, arguments.flex), **shared}
            except torch.cuda.OutOfMemoryError:
                print(f"{cell}: left out, the GPU's memory is too small")
                continue
            rows.append(row)
            print(line_of(row), flush=True)
            if file is not None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                if len(rows) == 1:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
    finally:
        if file is not None:
            file.close()
    print("\nBaselines' times over ours, geometric means:")
    print("\n".join(summary(rows)))
    return rows
