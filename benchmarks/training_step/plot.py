"""Draw a CSV of ``bench_training_step.py``: time of a step by stage, and its peak of memory.

python benchmarks/training_step/plot.py benchmarks/results/training_step_cpu.csv [picture.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.common.plotting import plot_from_command_line, plt, save
from benchmarks.common.table import Row, read_table

STAGES = {"forward": "#4c72b0", "backward": "#dd8452", "optimizer": "#55a868"}
NAMES = {
    "prefix_kernels": "prefix_kernels",
    "torch": "torch.cat + SDPA",
    "peft": "PEFT",
    "accelerated_peft": "PEFT, accelerated",
}
MEMORY = "#8172b2"


def draw_cell(times: plt.Axes, memory: plt.Axes, rows: list[Row]) -> None:
    """Draw a bar for every contender, the first on top, or a word in its place if the contender refused the cell."""
    for place, row in enumerate(rows):
        if row["refusal"]:
            for axes in (times, memory):
                axes.text(0, place, " cannot", va="center", fontsize=7, color="grey")
            continue
        left = 0.0
        for stage, colour in STAGES.items():
            width = float(row[f"{stage}_ms"])
            times.barh(place, width, left=left, color=colour, height=0.7)
            left += width
        times.text(left, place, f" {left:.0f} ms, {float(row['step_ratio']):.2f}x", va="center", fontsize=7)
        peak = float(row["peak_mib"])
        memory.barh(place, peak, color=MEMORY, height=0.7)
        memory.text(peak, place, f" {peak:.0f} MiB", va="center", fontsize=7)
    for axes in (times, memory):
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [NAMES[row["contender"]] for row in rows], fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=7)
        axes.margins(x=0.3)
    first = rows[0]
    checkpointing = ", activation checkpointing" if first["checkpointing"] == "1" else ""
    times.set_title(f"B = {first['batch']}, S = {first['length']}{checkpointing}", fontsize=8, loc="left")


def plot(source: Path, picture: Path) -> None:
    """Write ``picture`` from the CSV ``source``."""
    rows = read_table(source)
    columns = ("batch", "length", "checkpointing")
    cells = dict.fromkeys(tuple(row[column] for column in columns) for row in rows)
    figure, panels = plt.subplots(len(cells), 2, figsize=(9, 1.5 * len(cells)), layout="constrained", squeeze=False)
    for (times, memory), cell in zip(panels, cells, strict=True):
        draw_cell(times, memory, [row for row in rows if tuple(row[column] for column in columns) == cell])
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (*STAGES.values(), MEMORY)]
    labels = [*STAGES, "peak of memory"]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    first = rows[0]
    figure.supxlabel(
        f"Medians; x: times ours. float32, {first['threads']} threads, {first['cpu']}, {first['isa']}, torch "
        f"{first['torch']}, Transformers {first['transformers']}, PEFT {first['peft']}, commit {first['commit']}, "
        f"{first['date']}",
        fontsize=6,
    )
    save(figure, picture)


if __name__ == "__main__":
    plot_from_command_line(plot, __doc__)
