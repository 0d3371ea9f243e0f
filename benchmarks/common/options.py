"""The command line of the two ``bench_attention.py``, for the CPU and for a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path


def attention_parser(description: str, dtype: str) -> argparse.ArgumentParser:
    """A parser with the options that both devices have; ``dtype`` is the default element type."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default=dtype)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40, help="of a cell, at most")
    parser.add_argument("--quick", action="store_true", help="a few cells and rounds; not for results")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further cell is begun")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="these cells alone")
    parser.add_argument("--output", type=Path, help="CSV; default: a file of results/, of the whole plan alone")
    return parser


def output_of(arguments: argparse.Namespace, default: Path) -> Path | None:
    """The CSV to write: the one asked for, else ``default`` if the whole plan is measured, else none."""
    is_part = arguments.quick or arguments.where
    return arguments.output or (None if is_part else default)
