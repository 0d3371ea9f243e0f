"""The picture of a CSV of ``bench_attention.py``: how many times faster than each baseline, cell by cell.

python benchmarks/plot.py benchmarks/results/attention_cpu_float32.csv [picture.png]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PASSES = {"forward": "forward", "backward": "whole backward", "prefix_backward": "prefix-only backward"}
BASELINES = {
    "cat_sdpa": ("torch.cat + SDPA", "#4c72b0"),
    "cat_sdpa_causal_bias": ("torch.cat + SDPA, causal bias", "#55a868"),
    "merged_sdpa": ("SDPA on the sequence, merged by lse", "#dd8452"),
}


def label(row: dict[str, str]) -> str:
    shape = ",".join(row[name] for name in ("batch", "heads", "length", "prefix_len", "head_dim"))
    return f"{shape}\n{'causal' if row['causal'] == '1' else 'full'}"


def draw_pass(axes: plt.Axes, rows: list[dict[str, str]], title: str) -> None:
    """A group of bars for every cell, one for every baseline that it has."""
    rows = sorted(rows, key=lambda row: row["causal"])
    for position, row in enumerate(rows):
        present = [name for name in BASELINES if row[f"{name}_ratio"]]
        width = 0.8 / len(present)
        for i, name in enumerate(present):
            ratio, (_, colour) = float(row[f"{name}_ratio"]), BASELINES[name]
            x = position - 0.4 + (i + 0.5) * width
            axes.bar(x, ratio - 1, width, bottom=1, color=colour)
            axes.text(
                x, ratio, f"{ratio:.2g}" if ratio < 9.95 else f"{ratio:.0f}", ha="center", va="bottom", fontsize=7
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
    axes.set_ylim(bottom=min(0.5, *axes.get_ylim()), top=axes.get_ylim()[1] * 1.3)
    axes.set_xticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def plot(source: Path, picture: Path) -> None:
    """Write ``picture`` from the CSV ``source``."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, panels = plt.subplots(len(PASSES), 1, figsize=(11, 9), layout="constrained")
    for axes, (pass_, title) in zip(panels, PASSES.items(), strict=True):
        draw_pass(axes, [row for row in rows if row["pass"] == pass_], title)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in BASELINES.values()]
    names = [name for name, _ in BASELINES.values()]
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    first = rows[0]
    conditions = (
        f"Times faster than each baseline (log scale); cells are B,H,S,P,D. {first['dtype']}, "
        f"{first['threads']} threads, {first['cpu']}, {first['isa']}, torch {first['torch']}, "
        f"commit {first['commit']}, {first['date']}."
    )
    figure.supxlabel(conditions, fontsize=8)
    figure.savefig(picture, dpi=130)
    print(picture)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    csv_file = Path(sys.argv[1])
    plot(csv_file, Path(sys.argv[2]) if len(sys.argv) == 3 else csv_file.with_suffix(".png"))
