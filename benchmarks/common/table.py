"""Tables of a benchmark: the CSV, the ratios of a row, the means over rows."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# The folder of the tables that are committed.
RESULTS = Path(__file__).parents[1] / "results"


class Table:
    """A CSV file that is written row by row, so that a run that is cut off leaves its rows; without a path, no file."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if path is None else path.open("w", newline="")

    def __enter__(self) -> Table:
        return self

    def add(self, row: Row) -> None:
        if self._file is None:
            return
        writer = csv.DictWriter(self._file, fieldnames=list(row))
        if self._file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV, every value a string."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def ratios_to_ours(times: dict[str, list[float]]) -> dict[str, float]:
    """The median over the rounds of each baseline's time over ours, by name of the baseline."""
    return {
        name: statistics.median(theirs / own for theirs, own in zip(times[name], times["ours"], strict=True))
        for name in times
        if name != "ours"
    }


def summary(rows: Iterable[Row], names: Iterable[str], by: tuple[str, ...]) -> list[str]:
    """Lines of text: geometric mean and lowest ratio to every baseline, for each group of rows with equal ``by``."""
    rows, lines = list(rows), []
    for group in dict.fromkeys(tuple(row[column] for column in by) for row in rows):
        chosen = [row for row in rows if tuple(row[column] for column in by) == group]
        title = " ".join(f"{column}={value}" for column, value in zip(by, group, strict=True))
        for name in names:
            ratios = [float(row[f"{name}_ratio"]) for row in chosen if row[f"{name}_ratio"]]
            if ratios:
                mean = f"{geometric_mean(ratios):6.2f}x {name:20}"
                lines.append(f"{title:30}{mean} (lowest {min(ratios):.2f}x, {len(ratios)} cells)")
    return lines
