"""The roofline of a CSV of ``bench_attention.py``: GFLOP/s over FLOPs per byte, under the ceilings of the machine.

python benchmarks/roofline_plot.py benchmarks/results/attention_cpu_float32.csv [picture.png]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plot import TITLES, by_pass, conditions, read_table
from table import Row

OURS, CAT, ALTERNATIVE = "#4c72b0", "#c44e52", "#dd8452"


def _ceilings(row: Row) -> tuple[dict[str, float], dict[str, float]]:
    """Peaks in GFLOP/s and bandwidths in GB/s, by name."""
    peaks = {"float32 multiply-add": float(row["fma_gflops"])}
    if row["bfloat16_dot_gflops"] and row["dtype"] == "bfloat16":
        peaks["bfloat16 dot product"] = float(row["bfloat16_dot_gflops"])
    memory = max(float(row["read_gbps"]), float(row["copy_gbps"]))
    return peaks, {"DRAM": memory, "last-level cache": float(row["cache_gbps"])}


def draw_pass(axes: plt.Axes, rows: list[Row], title: str) -> None:
    """Ours filled, the fastest baselines of both kinds hollow, one above the other in each cell."""
    peaks, bandwidths = _ceilings(rows[0])
    intensities = [float(row["flops"]) / float(row["bytes"]) for row in rows]
    top = max(peaks.values())
    left, right = min(intensities) / 2, max(max(intensities), top / min(bandwidths.values())) * 2
    grid = [left * (right / left) ** (i / 200) for i in range(201)]
    for (name, bandwidth), style in zip(bandwidths.items(), ("-", "--"), strict=True):
        label = f"{name} {bandwidth:.0f} GB/s"
        axes.plot(grid, [min(top, x * bandwidth) for x in grid], style, color="black", linewidth=0.8, label=label)
    for name, peak in peaks.items():
        axes.axhline(peak, color="grey", linewidth=0.8, linestyle=":")
        axes.text(right, peak, f"{name} {peak:.0f} ", ha="right", va="bottom", fontsize=6)
    for causal, marker in (("0", "o"), ("1", "^")):
        for series, colour, label in (
            (None, OURS, "ours"),
            ("cat", CAT, "torch.cat"),
            ("alternative", ALTERNATIVE, "merged"),
        ):
            points = [
                (x, float(row["flops"]) / 1e6 / float(row["ours_ms"] if series is None else row[f"{row[series]}_ms"]))
                for x, row in zip(intensities, rows, strict=True)
                if row["causal"] == causal and (series is None or row[series])
            ]
            if points:
                fill = colour if series is None else "none"
                kind = "causal" if causal == "1" else "full"
                axes.scatter(
                    *zip(*points, strict=True),
                    s=22,
                    marker=marker,
                    edgecolors=colour,
                    facecolors=fill,
                    linewidths=0.8,
                    label=f"{label}, {kind}",
                    zorder=3,
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(top=10 ** (math.log10(top) + 0.3))
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=6, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def plot(source: Path, picture: Path) -> None:
    """Write ``picture`` from the CSV ``source``: a panel for each pass."""
    rows = read_table(source)
    groups = by_pass(rows)
    lines = math.ceil(len(groups) / 2)
    figure, panels = plt.subplots(lines, 2, figsize=(11, 0.8 + 3.6 * lines), squeeze=False, layout="constrained")
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    for axes, (pass_, group) in zip(panels.flat, groups.items(), strict=False):
        draw_pass(axes, group, TITLES[pass_])
    figure.supylabel("GFLOP/s of the visible pairs", fontsize=8)
    figure.supxlabel(f"FLOPs per byte that must move. {conditions(rows[0])}.", fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    print(picture)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    csv_file = Path(sys.argv[1])
    default = csv_file.with_name(f"{csv_file.stem}_roofline.png")
    plot(csv_file, Path(sys.argv[2]) if len(sys.argv) == 3 else default)
