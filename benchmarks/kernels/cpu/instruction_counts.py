"""Count the instructions of the CPU kernels by their purpose, with valgrind, whatever else the machine is doing.

    python benchmarks/kernels/cpu/instruction_counts.py [--where COLUMN=VALUE[,VALUE...]] [--output FILE]

Every cell of ``plan.py`` runs once, on one thread, cut down to one batch row and one key head; those that are long
even so are left out. Valgrind knows no AVX-512, so it is the AVX2 kernels that are counted. A cell needs at least its
FLOPs as multiply-adds of eight lanes; the table sets beside them all instructions of the kernels, by their purpose. A
register block of the matrix product itself needs 2 instructions per multiply-add: its loads, broadcasts and the loop
come on top.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.table import RESULTS, Table
from benchmarks.kernels.cpu.callgrind import KINDS, OTHER, cells_of, count, row_of, run_cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE[,VALUE...]")
    parser.add_argument("--output", type=Path, default=RESULTS / "instructions_avx2.csv")
    parser.add_argument("--run", metavar="LIBRARY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:  # the process that valgrind watches
        run_cells(cells_of(arguments.where), arguments.run)
        return
    wishes = [part for wish in arguments.where for part in ("--where", wish)]
    with Table(arguments.output) as table:
        for cell, counts in count(cells_of(arguments.where), [sys.executable, __file__, *wishes, "--run"]):
            row = row_of(cell, counts)
            table.add(row)
            shape = (cell.q_heads, cell.q_len, cell.k_len, cell.prefix_len, cell.head_dim)
            shares = ", ".join(f"{kind} {row[kind]}" for kind in [*KINDS, OTHER] if row[kind] >= 0.01)
            print(f"{cell.pass_:16} {shape} {'causal' if cell.is_causal else 'full':6} {row['all']:6.2f}: {shares}")


if __name__ == "__main__":
    main()
