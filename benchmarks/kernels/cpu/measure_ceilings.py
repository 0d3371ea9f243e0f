"""Measure what this machine's processor and memory do at best.

python benchmarks/kernels/cpu/measure_ceilings.py --threads 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.kernels.cpu.ceilings import CeilingLoops, measure_ceilings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(measure_ceilings(CeilingLoops(arguments.threads), arguments.repeats))


if __name__ == "__main__":
    main()
