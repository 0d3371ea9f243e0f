"""Trials of each library at each want, their CSV, and the Markdown table made from it."""

from __future__ import annotations

import csv
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from benchmarks.compatibility.libraries import Library
from benchmarks.compatibility.probes import ROWS, Row

TABLE = Path(__file__).parents[1] / "results" / "what_works.csv"
# The checkout's page that shows the table, and the lines that it stands between.
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
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
        """Library and versions that were tried together: a column of the table."""
        return self.library, self.version, self.transformers


def versions(library: Library) -> tuple[str, str, str]:
    """Installed versions of the library, of Transformers and of torch."""
    torch_version = torch.__version__.split("+")[0]
    return importlib.metadata.version(library.package), transformers.__version__, torch_version


def shortened(message: str, ends: int = 250) -> str:
    """The message as one line; a long one keeps ``ends`` characters of its beginning and of its end."""
    line = " ".join(message.split())
    return line if len(line) <= 2 * ends else f"{line[:ends]} ... {line[-ends:]}"


def attempt(row: Row, model: str, library: Library) -> Result:
    """Try ``row`` on ``model``; an error that is raised is the finding."""
    torch.manual_seed(0)
    works, seen = "yes", ""
    try:
        row.probe(library, model)
    except Exception as error:
        works, seen = "no", shortened(f"{type(error).__name__}: {error}")
    return Result(row.want, model, library.name, *versions(library), works, seen)


def read(path: Path) -> list[Result]:
    """The lines of the CSV."""
    with path.open(newline="") as file:
        return [Result(**line) for line in csv.DictReader(file)]


def write(path: Path, results: list[Result]) -> None:
    """Write the CSV anew."""
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
