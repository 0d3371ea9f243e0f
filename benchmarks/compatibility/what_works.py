"""Try what works with prefix tuning by this package, by PEFT and by AdapterHub's ``adapters``.

    # with this Transformers
    python benchmarks/compatibility/what_works.py --library prefix_kernels accelerated_peft peft
    # in an environment of torch, adapters and accelerate
    python benchmarks/compatibility/what_works.py --library adapters
    python benchmarks/compatibility/what_works.py  # only prints the table

The wants are the rows of ``probes.py``. The outcome of each, with the message where it failed, goes into one CSV
(``--table``), in which a run replaces the one with the same library and the same Transformers.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import transformers

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.compatibility.libraries import LIBRARIES
from benchmarks.compatibility.probes import ROWS
from benchmarks.compatibility.trials import TABLE, attempt, markdown, read, versions, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, nargs="*", default=[], help="try these")
    parser.add_argument("--only", default="", help="try the rows whose name contains this, and write nothing")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: %(default)s")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    results = read(arguments.table) if arguments.table.exists() else []
    for library in map(LIBRARIES.get, arguments.library):
        run = (library.name, *versions(library)[:2])
        results = [result for result in results if result.run != run]
        for row in ROWS:
            for model in row.models if arguments.only in row.want else ():
                results.append(attempt(row, model, library))
                print(*results[-1][2:5], row.want, f"({model}):", *results[-1][6:], flush=True)
    if arguments.only:
        return
    if arguments.library:
        write(arguments.table, results)
    print(markdown(results))


if __name__ == "__main__":
    main()
