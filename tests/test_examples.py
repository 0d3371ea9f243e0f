"""The example runs as a user would run it, for a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from prefix_kernels.checkpoint import read_prefix_metadata
from prefix_kernels.integrations.transformers import PrefixTuningConfig

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(EXAMPLES / "sst2.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def table_of(output: str) -> dict[str, str]:
    """The lines of the final table: a name, at least two spaces, a value."""
    rows = [line.rsplit("  ", 1) for line in output.splitlines() if "  " in line.strip()]
    return {name.strip(): value.strip() for name, value in (row for row in rows if len(row) == 2)}


@pytest.mark.parametrize(
    "options", [[], ["--attention", "torch", "--projection", "--bf16"]], ids=["default", "options"]
)
def test_sst2_trains_saves_reloads_classifies_and_reports(tmp_path: Path, options: list[str]) -> None:
    steps = ["--max-steps", "2", "--train-size", "32", "--batch-size", "8", "--num-virtual-tokens", "4"]
    result = run("A joy from start to finish.", *steps, *options, "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr

    assert ") A joy from start to finish." in result.stdout.replace("  ", " ")
    assert any(label in result.stdout for label in ("positive (", "negative ("))
    table = table_of(result.stdout)
    for accuracy in ("accuracy on 40 held-out sentences, before", "accuracy after training"):
        assert 0 <= float(table[accuracy].removesuffix("%")) <= 100
    for seconds in ("seconds per step, prefix_kernels", "seconds per step, torch.cat + SDPA"):
        assert float(table[seconds]) > 0
    head = 384 * 2 + 2
    prefix = 4 * 2 * 6 * 384
    if not options:
        assert table["trainable parameters"].startswith(f"{prefix + head:,} (")

    stored = tmp_path / "task.safetensors"
    config = PrefixTuningConfig.from_json(read_prefix_metadata(stored)["prefix_tuning_config"])
    assert config.num_virtual_tokens == 4
    assert 4 * (prefix + head) <= stored.stat().st_size < 4 * (prefix + head) + 4096, "folded, and nothing else in it"
    assert table["saved task file"] == f"{stored.stat().st_size / 1024:.0f} KiB"
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "2/2" in result.stderr, "the progress bar of Trainer"


def test_sst2_under_accelerate_launch_shares_the_batches_and_reports_once(tmp_path: Path) -> None:
    # --multi_gpu is accelerate's name for several processes on one machine; without a GPU they meet through gloo.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    steps = ["--max-steps", "2", "--train-size", "32", "--batch-size", "8", "--num-virtual-tokens", "4"]
    result = run(*steps, "--output-dir", str(tmp_path), launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "'epoch': '1'" in result.stdout, "two steps of two batches of 8 are all 32 sentences"
    assert result.stdout.count("Learning curve") == 1
    assert (tmp_path / "task.safetensors").is_file()


def test_the_sentences_shipped_are_balanced_and_distinct() -> None:
    rows = {
        name: [line.split("\t") for line in (EXAMPLES / "data" / f"{name}.tsv").read_text().splitlines()[1:]]
        for name in ("train", "dev")
    }
    for name, size in {"train": 160, "dev": 40}.items():
        assert len(rows[name]) == size
        assert sum(label == "1" for _, label in rows[name]) == size // 2
    sentences = [sentence for split in rows.values() for sentence, _ in split]
    assert len(set(sentences)) == len(sentences)


def test_a_file_without_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\nA film.\n")
    result = run("--data", str(tmp_path), "--output-dir", str(tmp_path))
    assert result.returncode != 0
    assert "expected tab-separated columns with a header that names a column 'label'" in result.stderr
