"""How fast ``prefix_attention`` is, against the other ways to write it in PyTorch.

    python benchmarks/bench_attention.py                     # float32, two threads, CSV into benchmarks/results/
    python benchmarks/bench_attention.py --dtype bfloat16 --rounds 50
    python benchmarks/bench_attention.py --quick             # does it work: two cells, few rounds, no CSV
    python benchmarks/bench_attention.py --device cuda       # bfloat16, all that cuda_cells.py plans
    python benchmarks/bench_attention.py --device cuda --where pass=forward,decode head_dim=64      # a part of it

Every round times each contender once, one after the other in one process and in turns, so that a busy machine slows
all alike. A row of the CSV gives the median of each contender's times and the median over the rounds of the ratio of
each baseline's time to ours. Query, key, value and the gradient of out lie in memory as ``[B, S, H, D]``, as a model's
projections leave them. A backward time is that of ``torch.autograd.grad`` alone. GFLOP/s count the visible pairs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from baselines import cat_sdpa, cat_sdpa_causal_bias, causal_mask, merged_sdpa
from torch import Tensor

import prefix_kernels
from prefix_kernels import prefix_attention

# B, H, S, P, D: BERT at the width of MiniLM and of bert-base, a longer text, two long ones.
GRID = [(16, 12, 128, 20, 32), (8, 12, 128, 20, 64), (2, 12, 512, 20, 64), (1, 8, 2048, 64, 64), (1, 8, 2048, 64, 128)]
PASSES = ("forward", "backward", "prefix_backward")
BASELINES = ("cat_sdpa", "cat_sdpa_causal_bias", "merged_sdpa")
PREFIX_ONLY = (False, False, False, True, True)


@dataclass(frozen=True)
class Cell:
    """One line of the grid."""

    batch: int
    heads: int
    length: int
    prefix_len: int
    head_dim: int
    dtype: str
    is_causal: bool
    pass_: str

    def flops(self) -> int:
        """Of the visible pairs of query and key."""
        sequence = self.length * (self.length + 1) // 2 if self.is_causal else self.length**2
        prefix = self.length * self.prefix_len
        pairs = {
            "forward": 4 * (prefix + sequence),
            "backward": 10 * (prefix + sequence),
            "prefix_backward": 8 * prefix,
        }
        return pairs[self.pass_] * self.batch * self.heads * self.head_dim


def make_inputs(cell: Cell, device: str) -> list[Tensor]:
    """query, key, value ``[B, H, S, D]``, laid out as ``[B, S, H, D]``, and prefix_key, prefix_value ``[H, P, D]``."""
    dtype = getattr(torch, cell.dtype)
    shape = cell.batch, cell.length, cell.heads, cell.head_dim
    sequence = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    prefix = [torch.randn(cell.heads, cell.prefix_len, cell.head_dim, device=device, dtype=dtype) for _ in range(2)]
    return sequence + prefix


def contenders(cell: Cell, device: str) -> dict[str, Callable[..., Tensor]]:
    """Name and function of everything that is timed in the cell, ours first."""
    mask = causal_mask(cell.length, cell.length, cell.prefix_len, device) if cell.is_causal else None
    functions: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *inputs: prefix_attention(*inputs, is_causal=cell.is_causal),
        "cat_sdpa": lambda *inputs: cat_sdpa(*inputs, mask),
        "merged_sdpa": lambda *inputs: merged_sdpa(*inputs, cell.is_causal),
    }
    if cell.is_causal:
        functions["cat_sdpa_causal_bias"] = cat_sdpa_causal_bias
    return functions


def prepare(cell: Cell, function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """What one timed call of the contender is."""
    if cell.pass_ == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward

    needs = PREFIX_ONLY if cell.pass_ == "prefix_backward" else (True,) * 5
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    out = function(*leaves)
    generator = torch.Generator(out.device).manual_seed(1)
    dout = torch.randn(out.transpose(1, 2).shape, generator=generator, device=out.device).to(out.dtype).transpose(1, 2)
    return lambda: torch.autograd.grad(out, asked, dout, retain_graph=True)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    begin_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin_ns) / 1e6


def measure(cell: Cell, device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, by contender."""
    torch.manual_seed(0)
    inputs = make_inputs(cell, device)
    calls = {name: prepare(cell, function, inputs) for name, function in contenders(cell, device).items()}
    for call in calls.values():  # warm up
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(calls[name]))
    return times


def row_of(cell: Cell, times: dict[str, list[float]]) -> dict[str, object]:
    """The CSV's row without what all rows share."""
    ours = times["ours"]
    milliseconds = statistics.median(ours)
    row: dict[str, object] = {
        "batch": cell.batch,
        "heads": cell.heads,
        "length": cell.length,
        "prefix_len": cell.prefix_len,
        "head_dim": cell.head_dim,
        "dtype": cell.dtype,
        "causal": int(cell.is_causal),
        "pass": cell.pass_,
        "ours_ms": f"{milliseconds:.4f}",
        "ours_gflops": f"{cell.flops() / milliseconds / 1e6:.1f}",
    }
    for name in BASELINES:
        row[f"{name}_ms"] = f"{statistics.median(times[name]):.4f}" if name in times else ""
    for name in BASELINES:
        ratios = [theirs / own for theirs, own in zip(times.get(name, []), ours, strict=False)]
        row[f"{name}_ratio"] = f"{statistics.median(ratios):.3f}" if ratios else ""
    return row


def environment(device: str) -> dict[str, object]:
    """Machine, versions, commit and date: the conditions under which every row was taken."""
    repository = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
        except OSError:  # a copy on a machine without git
            return ""
        return done.stdout.strip()

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = git("rev-parse", "--short=10", "HEAD") or os.environ.get("COMMIT", "unknown")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa": torch.ops.prefix_kernels.cpu_isa(),
        "torch": torch.__version__,
        "prefix_kernels": prefix_kernels.__version__,
        "python": platform.python_version(),
        "commit": commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def geometric_means(rows: list[dict[str, object]]) -> Iterator[str]:
    """One line per pass: geometric mean and lowest of the ratios to every baseline."""
    for pass_ in PASSES:
        for causal in (0, 1):
            chosen = [row for row in rows if row["pass"] == pass_ and row["causal"] == causal]
            for name in BASELINES:
                ratios = [float(row[f"{name}_ratio"]) for row in chosen if row[f"{name}_ratio"]]
                if ratios:
                    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                    kind = "causal" if causal else "full"
                    yield f"{pass_:16} {kind:7} {mean:6.2f}x {name} (lowest {min(ratios):.2f}x, {len(ratios)} cells)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="two cells and five rounds; not for results")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, compiled for every cell; cuda only")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further cell is begun; cuda only")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="these cells alone; cuda only")
    parser.add_argument("--output", type=Path, help="CSV; default: a file of benchmarks/results")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    torch.set_num_threads(arguments.threads)

    shared = environment(arguments.device)
    print(", ".join(f"{name} {value}" for name, value in shared.items()))
    output = arguments.output
    if arguments.device == "cuda":
        import cuda_bench

        if output is None and not arguments.quick:
            output = cuda_bench.default_output(arguments.dtype)
        cuda_bench.run(arguments, shared, output)
        return

    grid, rounds = (GRID[:2], 5) if arguments.quick else (GRID, arguments.rounds)
    if output is None and not arguments.quick:
        output = Path(__file__).parent / "results" / f"attention_cpu_{arguments.dtype}.csv"

    rows = []
    for shape in grid:
        for is_causal in (False, True):
            for pass_ in PASSES:
                cell = Cell(*shape, dtype=arguments.dtype, is_causal=is_causal, pass_=pass_)
                row = row_of(cell, measure(cell, arguments.device, rounds))
                ratios = "  ".join(f"{row[f'{name}_ratio']}x {name}" for name in BASELINES if row[f"{name}_ratio"])
                kind = "causal" if is_causal else "full"
                print(f"{shape} {kind:6} {pass_:15} {row['ours_ms']:>9} ms {row['ours_gflops']:>7} GFLOP/s  {ratios}")
                rows.append({**row, **shared})

    print("\nGeometric means of the baselines' times over ours:")
    print("\n".join(geometric_means(rows)))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{output}")


if __name__ == "__main__":
    main()
