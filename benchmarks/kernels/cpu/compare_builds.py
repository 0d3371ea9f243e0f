"""Compare the speed of the CPU kernels of two source trees: which one is faster, and by how much.

    git worktree add /tmp/base main
    python benchmarks/kernels/cpu/compare_builds.py /tmp/base .
    python benchmarks/kernels/cpu/compare_builds.py /tmp/base . --isa avx2 --one-head --where pass=forward head_dim=64
    python benchmarks/kernels/cpu/compare_builds.py /tmp/base . --evict --where pass=decode --output decode.csv

Both trees' kernels are compiled with their own flags, loaded into one process and called on the same buffers in turns
of about 4 ms, over the cells of ``plan.py``. A busy machine then slows both alike: the same tree against itself differs
by 1 to 2%, where two processes one after the other hide 3 to 5%. A call that takes longer than a turn is a turn of its
own: ``--one-head`` cuts cells down to calls of a few milliseconds. On one thread, CPU time is counted, which leaves out
the time of other processes. A ratio is BASE's time over CHANGED's; above 1, CHANGED is faster. Only the kernels are
timed, without PyTorch's operator. The results are compared first: builds that differ by more than rounding are not
timed. The first run compiles for about a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.cells import Cell, select
from benchmarks.common.environment import REPOSITORY
from benchmarks.common.table import Table, geometric_mean
from benchmarks.kernels.cpu.builds import build
from benchmarks.kernels.cpu.caches import CacheFlush
from benchmarks.kernels.cpu.plan import plan
from benchmarks.kernels.cpu.turns import Comparison, compare

# Instruction sets by PyTorch's name of the best one that the processor has; the best comes first.
ISAS = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}


def line_of(cell: Cell, comparison: Comparison) -> str:
    """The comparison as one line of text."""
    shape = f"{cell.batch},{cell.q_heads}/{cell.kv_heads},{cell.q_len},{cell.k_len},{cell.prefix_len},{cell.head_dim}"
    quartiles, interval = comparison.middle_half, comparison.interval
    same = f"results differ by {comparison.difference:.1g}" if comparison.difference else "results equal bit by bit"
    return (
        f"{shape:26}{'causal' if cell.is_causal else 'full':7}{cell.pass_:17}"
        f"base {comparison.base_ms:8.3f} ms  changed {comparison.changed_ms:8.3f} ms  ratio {comparison.ratio:.3f} "
        f"(95%: {interval[0]:.3f} to {interval[1]:.3f}; middle half: {quartiles[0]:.3f} to {quartiles[1]:.3f}; "
        f"{len(comparison.ratios)} pairs)  {same}"
    )


def main() -> None:
    isas = ISAS.get(torch.backends.cpu.get_cpu_capability(), ("portable",))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE", help="source tree, e.g. a git worktree")
    parser.add_argument("changed", type=Path, metavar="CHANGED", help="source tree to compare with it")
    parser.add_argument("--isa", choices=isas, default=isas[0], help="instruction set (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of every call (default: %(default)s)")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="these cells alone")
    parser.add_argument("--one-head", action="store_true", help="one batch row and one head of keys of every cell")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each cell (default: %(default)s)")
    parser.add_argument("--evict", action="store_true", help="empty the caches before every turn, which is one call")
    parser.add_argument("--output", type=Path, help="CSV (default: none)")
    parser.add_argument("--build-folder", type=Path, default=REPOSITORY / "build" / "compare_builds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        cells = select(plan(arguments.dtype), arguments.where)
        if arguments.one_head:
            cells = list(dict.fromkeys(cell.one_head() for cell in cells))
        base, changed = build([arguments.base, arguments.changed], arguments.isa, arguments.build_folder)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    evict = CacheFlush() if arguments.evict else None
    rows = []
    with Table(arguments.output) as table:
        for cell in cells:
            comparison = compare(cell, base, changed, threads=arguments.threads, seconds=arguments.seconds, evict=evict)
            rows.append({**cell.columns(), **comparison.columns()})
            table.add(rows[-1])
            print(line_of(cell, comparison), flush=True)
    print("\nBASE's times over CHANGED's, geometric means:")
    for pass_ in dict.fromkeys(row["pass"] for row in rows):
        ratios = [float(row["ratio"]) for row in rows if row["pass"] == pass_]
        print(f"{pass_:17}{geometric_mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} cells)")


if __name__ == "__main__":
    main()
