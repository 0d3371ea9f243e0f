"""Draw the roofline of a CSV of ``bench_attention.py``: GFLOP/s over FLOPs per byte, under the machine's ceilings.

python benchmarks/kernels/cpu/plot_roofline.py benchmarks/results/attention_cpu_float32.csv [picture.png]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.common.plotting import plot_from_command_line, plt, save
from benchmarks.common.table import Row, read_table
from benchmarks.kernels.cpu.panels import TITLES, by_pass, conditions

# Column that names the contender to draw (empty: ours), label, colour.
SERIES = (
    ("", "ours", "#4c72b0"),
    ("cat", "torch.cat + SDPA, the fastest", "#c44e52"),
    ("alternative", "the fastest alternative", "#dd8452"),
)


def _ceilings(row: Row) -> tuple[dict[str, float], dict[str, float]]:
    """Peaks in GFLOP/s and bandwidths in GB/s, by name."""
    peaks = {"float32 multiply-add": float(row["fma_gflops"])}
    if row["bfloat16_dot_gflops"] and row["dtype"] == "bfloat16":
        peaks["bfloat16 dot product"] = float(row["bfloat16_dot_gflops"])
    return peaks, {"DRAM": float(row["read_gbps"]), "last-level cache": float(row["cache_gbps"])}


def _points(rows: list[Row], series: str) -> list[tuple[float, float]]:
    """FLOPs per byte and GFLOP/s of the rows that have the contender."""
    named = [(row, row[series] if series else "ours") for row in rows]
    return [
        (float(row["flops"]) / float(row["bytes"]), float(row["flops"]) / float(row[f"{name}_ms"]) / 1e6)
        for row, name in named
        if name
    ]


def draw_pass(axes: plt.Axes, rows: list[Row], title: str) -> None:
    """Draw ours filled and the fastest baselines of both kinds hollow, one above the other in each cell."""
    peaks, bandwidths = _ceilings(rows[0])
    top = max(peaks.values())
    intensities = [x for x, _ in _points(rows, "")]
    corners = [top / bandwidth for bandwidth in bandwidths.values()]
    left = 10 ** math.floor(math.log10(min(*intensities, *corners)))
    right = 10 ** math.ceil(math.log10(max(*intensities, *corners)))
    for (name, bandwidth), corner, style in zip(bandwidths.items(), corners, ("-", "--"), strict=True):
        label = f"{name}, {bandwidth:.0f} GB/s"
        axes.plot([left, corner, right], [left * bandwidth, top, top], style, color="black", linewidth=0.8, label=label)
    for name, peak in peaks.items():
        axes.axhline(peak, color="grey", linewidth=0.8, linestyle=":")
        axes.text(right, peak, f"{name} {peak:.0f} ", ha="right", va="bottom", fontsize=6)
    for causal, marker, kind in (("0", "o", "full"), ("1", "^", "causal")):
        chosen = [row for row in rows if row["causal"] == causal]
        for series, name, colour in SERIES:
            points = _points(chosen, series)
            if points:
                style = dict(edgecolors=colour, facecolors="none" if series else colour, linewidths=0.8)
                axes.scatter(
                    *zip(*points, strict=True), s=22, marker=marker, label=f"{name}, {kind}", zorder=3, **style
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(top=2 * top)
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def plot(source: Path, picture: Path) -> None:
    """Write ``picture`` from the CSV ``source``: a panel for each pass."""
    rows = read_table(source)
    groups = by_pass(rows)
    lines = math.ceil(len(groups) / 2)
    figure, panels = plt.subplots(lines, 2, figsize=(11, 0.8 + 3.6 * lines), squeeze=False, layout="constrained")
    for axes, (pass_, group) in zip(panels.flat, groups.items(), strict=False):
        draw_pass(axes, group, TITLES[pass_])
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    labels = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.supylabel("GFLOP/s of the visible pairs", fontsize=8)
    figure.supxlabel(f"FLOPs per byte that must move. {conditions(rows[0])}.", fontsize=8)
    save(figure, picture)


if __name__ == "__main__":
    plot_from_command_line(plot, __doc__, ending="_roofline.png")
