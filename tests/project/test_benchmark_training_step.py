"""The benchmark of a training step: every contender has a row, with figures or with the reason why it has none."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from scripts import run_script

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> None:
    result = run_script(BENCHMARKS / script, *arguments)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training_step") / "table.csv"
    short = ["--lengths", "16", "512", "--tokens", "16", "--rounds", "1"]
    run("training_step/bench_training_step.py", *short, "--output", str(path))
    return path


def test_every_contender_trains_or_says_why_it_cannot(table: Path) -> None:
    with table.open(newline="") as file:
        rows = {(row["length"], row["checkpointing"], row["contender"]): row for row in csv.DictReader(file)}
    contenders = ("prefix_kernels", "torch", "peft", "accelerated_peft")
    assert list(rows) == [(s, c, name) for s in ("16", "512") for c in ("0", "1") for name in contenders]
    for (length, checkpointing, contender), row in rows.items():
        # PEFT needs positions behind the prefix, and its models train without it under checkpointing.
        refused = contender == "peft" and (checkpointing == "1" or length == "512")
        refused = refused or (contender == "accelerated_peft" and length == "512")
        assert bool(row["refusal"]) == refused, row
        stages = [float(row[f"{stage}_ms"] or 0) for stage in ("forward", "backward", "optimizer")]
        assert all(time > 0 for time in stages) != refused
        assert bool(row["peak_mib"]) != refused


def test_its_picture_is_drawn_from_the_table(table: Path, tmp_path: Path) -> None:
    run("training_step/plot.py", str(table), str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
