"""Try what works with prefix tuning by this package, by PEFT and by AdapterHub's ``adapters``.

    # with this Transformers, and torchao
    python benchmarks/compatibility/what_works.py --library prefix_kernels accelerated_peft peft
    # in an environment of torch, torchao, adapters, accelerate and pillow
    python benchmarks/compatibility/what_works.py --library adapters
    python benchmarks/compatibility/what_works.py  # only writes the table of docs/compatibility.md anew, from the CSV
    python benchmarks/compatibility/what_works.py --check  # fails if that page's table is not the CSV's

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
from benchmarks.compatibility.trials import PAGE, TABLE, attempt, read, versions, with_table, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, nargs="*", default=[], help="try these")
    parser.add_argument("--only", default="", help="try the rows whose name contains this, and write nothing")
    parser.add_argument("--table", type=Path, default=TABLE, help="the CSV; default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that shows it; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page shows another table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    results = read(arguments.table) if arguments.table.exists() else []
    if arguments.check:
        page = arguments.page.read_text(encoding="utf-8")
        if page != with_table(page, results):
            sys.exit(f"{arguments.page}: expected the table of {arguments.table}, got another; leave out --check")
        return
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
    page = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(with_table(page, results), encoding="utf-8")


if __name__ == "__main__":
    main()
