"""Which lines of the kernel headers the emulated tests have run.

    PREFIX_KERNELS_EMULATOR=coverage python -m pytest tests/cuda/test_cuda_forward.py ...
    PREFIX_KERNELS_EMULATOR=coverage python tests/emulator/coverage.py [least per cent]

Counts add up from run to run until a kernel changes. Prints a line per header with the lines that no test ran, and
fails where the whole is below the least.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from emulated import CHECKOUT, FOLDER, VARIANT

Counts = dict[Path, dict[int, int]]


def _count(data: Path) -> Counts:
    """How often each line of the kernel headers ran in one object; instantiations of a template count together."""
    command = ["gcov", "--json-format", "--stdout", str(data)]
    report = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    counts: Counts = defaultdict(lambda: defaultdict(int))
    for file in json.loads(report)["files"]:
        path = (CHECKOUT / file["file"]).resolve()
        if path.suffix == ".cuh" and path.is_relative_to(CHECKOUT / "csrc" / "cuda"):
            for line in file["lines"]:
                counts[path][line["line_number"]] += line["count"]
    return counts


def _runs(numbers: Iterable[int]) -> str:
    """``3, 4, 5, 9`` as ``3-5, 9``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def main(least: float = 95.0) -> int:
    """Print the report; 1 where less than ``least`` per cent of all lines ran."""
    if VARIANT != "coverage":
        print("expected the environment variable PREFIX_KERNELS_EMULATOR=coverage")
        return 1
    total: Counts = defaultdict(lambda: defaultdict(int))
    with ThreadPoolExecutor() as pool:
        for counts in pool.map(_count, sorted(FOLDER.glob("*/csrc_cuda_*.gcda"))):
            for path, lines in counts.items():
                for number, count in lines.items():
                    total[path][number] += count
    if not total:
        print(f"no test has run with the library in {FOLDER}")
        return 1
    ran = lines = 0
    for path in sorted(total):
        missed = [number for number, count in total[path].items() if count == 0]
        lines += len(total[path])
        ran += len(total[path]) - len(missed)
        share = 100 * (1 - len(missed) / len(total[path]))
        print(f"{share:6.1f} %  {path.relative_to(CHECKOUT)}  {_runs(missed)}".rstrip())
    print(f"{100 * ran / lines:6.1f} %  of {lines} lines")
    return int(100 * ran / lines < least)


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:2])))
