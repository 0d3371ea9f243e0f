"""Print which goals of the CPU kernels a table of ``bench_attention.py`` meets, and the cells that miss one.

python benchmarks/kernels/cpu/check_goals.py benchmarks/results/attention_cpu_float32.csv [another.csv ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.table import read_table
from benchmarks.kernels.cpu.goals import judge


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        print("\n".join(judge(read_table(Path(path)))))


if __name__ == "__main__":
    main()
