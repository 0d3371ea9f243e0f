"""What works with prefix tuning by this package, by PEFT and by AdapterHub's ``adapters``: each claim is tried.

    python benchmarks/what_works.py --library prefix_kernels accelerated_peft peft  # with this Transformers
    python benchmarks/what_works.py --library adapters  # in an environment of torch, adapters and accelerate
    python benchmarks/what_works.py  # only writes the table of docs/compatibility.md anew, from the CSV
    python benchmarks/what_works.py --check  # fails if that page's table is not the CSV's

The wants are the rows of ``prefix_tuning_probes.py``. The outcome of each, with the message where it failed, goes into
one CSV (``--table``), in which a run replaces the one with the same library and the same Transformers.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from prefix_tuning_libraries import LIBRARIES, Library
from prefix_tuning_probes import ROWS, Row

TABLE = Path(__file__).parent / "results" / "what_works.csv"
CHECKOUT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PAGE = CHECKOUT / "docs" / "compatibility.md"
# The lines of the page that the table stands between.
BEGIN, END = "<!-- begin: written from what_works.csv by what_works.py -->", "<!-- end -->"
TITLES = {
    "prefix_kernels": "prefix_kernels {}",
    "accelerated_peft": "PEFT {} after `accelerate`",
    "peft": "PEFT {}",
    "adapters": "adapters {}",
}


class Result(NamedTuple):
    """A line of the CSV."""

    want: str
    model: str
    library: str
    version: str
    transformers: str
    torch: str
    works: str
    seen: str

    @property
    def run(self) -> tuple[str, str, str]:
        return self.library, self.version, self.transformers


def versions(library: Library) -> tuple[str, str, str]:
    """Of the library, Transformers and torch, as installed."""
    torch_version = torch.__version__.split("+")[0]
    return importlib.metadata.version(library.package), transformers.__version__, torch_version


def shortened(message: str, ends: int = 250) -> str:
    """One line: the beginning and the end, of ``ends`` characters each, where it is longer."""
    line = " ".join(message.split())
    return line if len(line) <= 2 * ends else f"{line[:ends]} ... {line[-ends:]}"


def attempt(row: Row, model: str, library: Library) -> Result:
    """Tries ``row`` on ``model``; whatever is raised is the finding."""
    torch.manual_seed(0)
    works, seen = "yes", ""
    try:
        row.probe(library, model)
    except Exception as error:
        works, seen = "no", shortened(f"{type(error).__name__}: {error}")
    return Result(row.want, model, library.name, *versions(library), works, seen)


def read(path: Path) -> list[Result]:
    with path.open(newline="") as file:
        return [Result(**line) for line in csv.DictReader(file)]


def write(path: Path, results: list[Result]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        writer.writerows(results)


def markdown(results: list[Result]) -> str:
    """A table with a column for each run; a cell that is neither yes nor no names the models that work."""
    runs = sorted({result.run for result in results}, key=lambda run: (list(TITLES).index(run[0]), run[1:]))
    works = {(result.want, result.model, result.run): result.works == "yes" for result in results}

    def cell(row: Row, run: tuple[str, str, str]) -> str:
        working = [model for model in row.models if works[row.want, model, run]]
        return "yes" if len(working) == len(row.models) else ", ".join(working) or "no"

    def label(row: Row) -> str:
        return row.want if len(row.models) == 1 else f"{row.want}: {', '.join(row.models)}"

    titles = [f"{TITLES[library].format(version)}, Transformers {base}" for library, version, base in runs]
    lines = [["", *titles], ["---"] * (1 + len(runs))]
    lines += [[label(row), *(cell(row, run) for run in runs)] for row in ROWS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(page: str, results: list[Result]) -> str:
    """The text of ``page`` with the table of ``results`` between the lines ``BEGIN`` and ``END``.

    Raises:
        ValueError: the page does not have these two lines.
    """
    before, begin, rest = page.partition(f"\n{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise ValueError(f"page: expected the lines {BEGIN!r} and {END!r}, got a page without them")
    return f"{before}{begin}\n{markdown(results)}\n\n{end}{after}"


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
            sys.exit(
                f"{arguments.page}: expected the table of {arguments.table}, got another; run this without --check"
            )
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
