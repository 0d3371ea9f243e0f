"""Draw a CSV of ``bench_attention.py``: how many times faster than each baseline, cell by cell.

python benchmarks/kernels/cpu/plot.py benchmarks/results/attention_cpu_float32.csv [picture.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.plotting import plot_from_command_line, plt, save
from benchmarks.common.table import Row, read_table
from benchmarks.kernels.cpu.panels import TITLES, by_pass, conditions

# Label and colour of each baseline.
BASELINES = {
    "cat_sdpa": ("torch.cat + SDPA", "#4c72b0"),
    "cat_sdpa_causal_bias": ("torch.cat + SDPA, causal bias", "#55a868"),
    "merged_sdpa": ("SDPA on the sequence, merged by lse", "#dd8452"),
    "merged_kernels": ("SDPA on sequence and prefix, merged by lse", "#c44e52"),
    "merged_float32": ("merged by lse, in float32", "#937860"),
    "merged_decode": ("merged by lse, heads of a group as rows", "#8172b2"),
    "matmul_decode": ("matrix products", "#8c8c8c"),
}


def cell_label(row: Row) -> str:
    """The cell's shape and mask: ``B,H,S,P,D``, or ``B,Hq/Hkv,S,P,D`` with grouped heads."""
    heads = row["q_heads"] if row["q_heads"] == row["kv_heads"] else f"{row['q_heads']}/{row['kv_heads']}"
    shape = f"{row['batch']},{heads},{row['k_len']},{row['prefix_len']},{row['head_dim']}"
    return f"{shape} causal" if row["causal"] == "1" and row["q_len"] != "1" else shape


def draw_pass(axes: plt.Axes, rows: list[Row], title: str) -> None:
    """Draw a group of bars for every cell, one for every baseline that it has."""
    for position, row in enumerate(rows):
        present = [name for name in BASELINES if row[f"{name}_ratio"]]
        height = 0.8 / len(present)
        for i, name in enumerate(present):
            ratio, (_, colour) = float(row[f"{name}_ratio"]), BASELINES[name]
            y = position - 0.4 + (i + 0.5) * height
            axes.barh(y, ratio - 1, height, left=1, color=colour)
            text = f" {ratio:.2g}" if ratio < 9.95 else f" {ratio:.0f}"
            axes.text(max(ratio, 1), y, text, ha="left", va="center", fontsize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.set_xlim(left=min(0.5, axes.get_xlim()[0]), right=axes.get_xlim()[1] * 1.3)
    axes.set_yticks(range(len(rows)), [cell_label(row) for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def plot(source: Path, picture: Path) -> None:
    """Write ``picture`` from the CSV ``source``: a panel for each pass."""
    rows = read_table(source)
    groups = by_pass(rows)
    heights = [1 + len(group) for group in groups.values()]
    size = (11, 1.2 + 0.3 * sum(heights))
    figure, panels = plt.subplots(
        len(groups), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, (pass_, group) in zip(panels[:, 0], groups.items(), strict=True):
        draw_pass(axes, group, TITLES[pass_])
    there = [
        (label, colour) for name, (label, colour) in BASELINES.items() if any(row[f"{name}_ratio"] for row in rows)
    ]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in there]
    figure.legend(
        handles, [label for label, _ in there], loc="outside upper center", ncols=3, frameon=False, fontsize=8
    )
    note = (
        f"Times faster than each baseline (log scale); cells are B,H,S,P,D or B,Hq/Hkv,S,P,D.\n{conditions(rows[0])}."
    )
    figure.supxlabel(note, fontsize=8)
    save(figure, picture)


if __name__ == "__main__":
    plot_from_command_line(plot, __doc__)
