"""How the examples end: a table on the terminal, and pictures drawn without a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)

__all__ = ["plt", "print_table"]


def print_table(rows: Mapping[str, str | Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print each name with its value, or values, in columns; ``header`` names all the columns."""
    lines = [tuple(header)] if header else []
    lines += [(name, values) if isinstance(values, str) else (name, *values) for name, values in rows.items()]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    print()
    for name, *values in lines:
        print(
            "  ".join([f"{name:<{first}}", *(f"{value:>{width}}" for value, width in zip(values, others, strict=True))])
        )
