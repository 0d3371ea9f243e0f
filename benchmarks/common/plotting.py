"""Pictures without a screen, and the command line that all plot scripts share: ``plot.py TABLE.csv [PICTURE.png]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["plot_from_command_line", "plt", "save"]


def save(figure: plt.Figure, picture: Path) -> None:
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def plot_from_command_line(plot: Callable[[Path, Path], None], usage: str, ending: str = ".png") -> None:
    """Call ``plot(table, picture)`` with the paths of the command line, and print the picture's.

    Args:
        usage: text to print if the command line is not ``TABLE.csv [PICTURE.png]``.
        ending: takes the place of the table's ``.csv`` if no picture is named.

    Raises:
        SystemExit: the command line names no table, or more than a table and a picture.
    """
    if len(sys.argv) not in (2, 3):
        sys.exit(usage)
    table = Path(sys.argv[1])
    picture = Path(sys.argv[2]) if len(sys.argv) == 3 else table.with_name(table.stem + ending)
    plot(table, picture)
    print(picture)
