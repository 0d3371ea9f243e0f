"""Time ``prefix_attention`` on this GPU against the other ways to write it in PyTorch.

    python benchmarks/kernels/cuda/bench_attention.py             # bfloat16, all cells of plan.py
    python benchmarks/kernels/cuda/bench_attention.py --where pass=decode    # a part of it, no CSV
    python benchmarks/kernels/cuda/bench_attention.py --flex --where pass=forward,backward

Every round times each contender once with an empty L2 cache, one after the other in one process and in turns. A row of
the CSV gives the median of each contender's times and the median over the rounds of the ratio of each baseline's time
to ours. A backward time is that of ``torch.autograd.grad`` alone. TFLOP/s count the visible pairs.
``benchmarks/run_on_gpu.sh`` builds, tests and measures in one go.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.environment import environment
from benchmarks.common.options import attention_parser, output_of
from benchmarks.kernels.cuda.measure import default_output, run


def main() -> None:
    parser = attention_parser(__doc__, dtype="bfloat16")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, compiled for every cell")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = environment("cuda")
    print(", ".join(f"{name} {value}" for name, value in shared.items()))
    output = output_of(arguments, default_output(arguments.dtype))
    run(arguments, shared, output)
    if output is not None:
        print(output)


if __name__ == "__main__":
    main()
