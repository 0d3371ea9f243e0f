"""How fast ``prefix_attention`` is, against the other ways to write it in PyTorch.

    python benchmarks/kernels/cpu/bench_attention.py              # float32, two threads, CSV into results/
    python benchmarks/kernels/cpu/bench_attention.py --dtype bfloat16 --cell-seconds 1
    python benchmarks/kernels/cpu/bench_attention.py --quick      # does it work: a cell of each kind, no CSV
    python benchmarks/kernels/cpu/bench_attention.py --device cuda  # bfloat16, all that kernels/cuda/plan.py plans
    python benchmarks/kernels/cpu/bench_attention.py --where pass=forward,decode head_dim=64      # a part of it

Every round times each contender once, one after the other in one process and in turns, so that a busy machine slows
all alike. A row of the CSV gives the median of each contender's times and the median over the rounds of the ratio of
each baseline's time to ours. Query, key, value and the gradient of out lie in memory as ``[B, S, H, D]``, as a model's
projections leave them. A backward time is that of ``torch.autograd.grad`` alone. GFLOP/s count the visible pairs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))

import prefix_kernels


def environment(device: str) -> dict[str, object]:
    """Machine, versions, commit and date: the conditions under which every row was taken."""
    repository = Path(__file__).parents[3]

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40, help="of a cell, at most")
    parser.add_argument("--cell-seconds", type=float, default=1.5, help="for the rounds of a cell; cpu only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few cells and rounds; not for results")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, compiled for every cell; cuda only")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further cell is begun")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="these cells alone")
    parser.add_argument("--output", type=Path, help="CSV; default: a file of results/, of the whole plan alone")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    torch.set_num_threads(arguments.threads)

    shared = environment(arguments.device)
    print(", ".join(f"{name} {value}" for name, value in shared.items()))
    if arguments.device == "cuda":
        from benchmarks.kernels.cuda import measure as bench

        default_output = bench.default_output(arguments.dtype)
    else:
        from benchmarks.kernels.cpu import measure as bench

        default_output = Path(__file__).parents[2] / "results" / f"attention_cpu_{arguments.dtype}.csv"
    output = arguments.output or (None if arguments.quick or arguments.where else default_output)
    bench.run(arguments, shared, output)
    if output is not None:
        print(output)


if __name__ == "__main__":
    main()
