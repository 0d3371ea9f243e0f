"""Draw a CSV of ``bench_attention.py``: how many times faster than each baseline, a panel for each pass.

python benchmarks/kernels/cuda/plot.py OUTDIR/attention_cuda.csv [picture.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.plotting import plot_from_command_line, plt, save
from benchmarks.common.table import Row, read_table

COLOURS = {
    "cat_flash": "#4c72b0",
    "cat_cudnn": "#55a868",
    "cat_masked": "#c44e52",
    "cat_flex": "#8172b2",
    "merged_flash": "#dd8452",
    "merged_cudnn": "#937860",
}


def cell_label(row: Row) -> str:
    heads = f"{row['batch']}x{row['q_heads']}/{row['kv_heads']}x{row['head_dim']}"
    return f"{heads} {row['q_len']},{row['k_len']}+{row['prefix_len']} {'causal' if row['causal'] == '1' else 'full'}"


def plot(table: Path, picture: Path) -> None:
    """Write ``picture`` from the CSV ``table``: a panel for each pass, a row of points for each cell."""
    rows = read_table(table)
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    heights = [0.6 + 0.16 * sum(row["pass"] == pass_ for row in rows) for pass_ in passes]
    figure, panels = plt.subplots(
        len(passes), 1, figsize=(9, 1 + sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, pass_ in zip(panels[:, 0], passes, strict=True):
        chosen = [row for row in rows if row["pass"] == pass_][::-1]
        for name, colour in COLOURS.items():
            points = [(float(row[f"{name}_ratio"]), y) for y, row in enumerate(chosen) if row[f"{name}_ratio"]]
            if points:
                axes.scatter(*zip(*points, strict=True), s=14, color=colour, label=name, zorder=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks(range(len(chosen)), [cell_label(row) for row in chosen], fontsize=6)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(pass_.replace("_", " "), fontsize=9)
    panels[0, 0].legend(fontsize=7)
    panels[-1, 0].set_xlabel("time of the baseline over ours")
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, torch {rows[0]['torch']}", fontsize=10)
    save(figure, picture)


if __name__ == "__main__":
    plot_from_command_line(plot, __doc__)
