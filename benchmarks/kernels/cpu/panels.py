"""Rows of a table of ``bench_attention.py``, grouped and named for the panels of its pictures."""

from __future__ import annotations

from benchmarks.common.table import Row

TITLES = {
    "forward": "forward",
    "backward": "whole backward",
    "prefix_backward": "prefix-only backward",
    "decode": "decode",
    "forward_backward": "forward and backward, dropout and padding",
}


def by_pass(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each pass that the table has, causal last."""
    groups = {pass_: [row for row in rows if row["pass"] == pass_] for pass_ in TITLES}
    return {pass_: sorted(group, key=lambda row: row["causal"]) for pass_, group in groups.items() if group}


def conditions(row: Row) -> str:
    """The conditions under which the table was measured, for the picture's foot."""
    return (
        f"{row['dtype']}, {row['threads']} threads, {row['cpu']}, {row['isa']}, torch {row['torch']}, "
        f"commit {row['commit']}, {row['date']}"
    )
