"""Time ``prefix_attention`` on this CPU against the other ways to write it in PyTorch.

    python benchmarks/kernels/cpu/bench_attention.py              # float32, two threads, CSV into benchmarks/results/
    python benchmarks/kernels/cpu/bench_attention.py --dtype bfloat16 --cell-seconds 1
    python benchmarks/kernels/cpu/bench_attention.py --quick      # does it work: a cell of each kind, no CSV
    python benchmarks/kernels/cpu/bench_attention.py --where pass=forward,decode head_dim=64      # a part of it

Every round times each contender once, one after the other in one process and in turns, so that a busy machine slows
all alike. A row of the CSV gives the median of each contender's times and the median over the rounds of the ratio of
each baseline's time to ours. Query, key, value and the gradient of out lie in memory as ``[B, S, H, D]``, as a model's
projections leave them. A backward time is that of ``torch.autograd.grad`` alone. GFLOP/s count the visible pairs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.environment import environment
from benchmarks.common.options import attention_parser, output_of
from benchmarks.common.table import RESULTS
from benchmarks.kernels.cpu.measure import run


def main() -> None:
    parser = attention_parser(__doc__, dtype="float32")
    parser.add_argument("--cell-seconds", type=float, default=1.5, help="for the rounds of a cell")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = environment("cpu")
    print(", ".join(f"{name} {value}" for name, value in shared.items()))
    output = output_of(arguments, RESULTS / f"attention_cpu_{arguments.dtype}.csv")
    run(arguments, shared, output)
    if output is not None:
        print(output)


if __name__ == "__main__":
    main()
