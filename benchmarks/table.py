"""The table of a benchmark: its CSV, and the means over its rows."""

from __future__ import annotations

import csv
import math
from pathlib import Path


class Table:
    """A CSV whose rows are in the file as soon as they are known; without a path, nothing."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if path is None else path.open("w", newline="")

    def __enter__(self) -> Table:
        return self

    def add(self, row: dict[str, object]) -> None:
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


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
