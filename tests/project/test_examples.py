"""The examples run as a user would run them, for a few steps."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors import safe_open
from scripts import run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from prefix_kernels.checkpoint import read_prefix_metadata
from prefix_kernels.integrations.transformers import PrefixTuningConfig, load_prefix_model

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(example: str, *arguments: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return run_script(EXAMPLES / example, *arguments, launcher=launcher)


def run_here(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: str) -> None:
    """The same in this process, which has imported everything already."""
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


def table_of(output: str, columns: int = 1) -> dict[str, str] | dict[str, list[str]]:
    """The lines of the final tables with so many values: columns are at least two spaces apart."""
    lines = [re.split(r" {2,}", line.strip()) for line in output.splitlines()]
    rows = {name: values for name, *values in lines if len(values) == columns}
    return {name: value for name, (value,) in rows.items()} if columns == 1 else rows


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options", [[], ["--attention", "torch", "--projection", "--bf16"]], ids=["default", "options"]
)
def test_sst2_trains_saves_reloads_classifies_and_reports(tmp_path: Path, options: list[str]) -> None:
    steps = ["--max-steps", "2", "--train-size", "32", "--batch-size", "8", "--num-virtual-tokens", "4"]
    result = run("sst2.py", "A joy from start to finish.", *steps, *options, "--output-dir", str(tmp_path))
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
    assert is_png(tmp_path / "learning_curve.png")
    assert "2/2" in result.stderr, "the progress bar of Trainer"


def test_sst2_under_accelerate_launch_shares_the_batches_and_reports_once(tmp_path: Path) -> None:
    # --multi_gpu is accelerate's name for several processes on one machine; without a GPU they meet through gloo.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    steps = ["--max-steps", "2", "--train-size", "32", "--batch-size", "8", "--num-virtual-tokens", "4"]
    result = run("sst2.py", *steps, "--output-dir", str(tmp_path), launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "'epoch': '1'" in result.stdout, "two steps of two batches of 8 are all 32 sentences"
    assert result.stdout.count("Learning curve") == 1
    assert (tmp_path / "task.safetensors").is_file()


def test_grpo_trains_alike_with_shared_prompts_and_computes_fewer_tokens(tmp_path: Path) -> None:
    sizes = ["--groups", "2", "--group-size", "3", "--prompt-length", "20", "--response-length", "4", "--steps", "2"]
    result = run("grpo.py", *sizes, "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    table = table_of(result.stdout, columns=2)
    assert table["tokens computed per update"] == ["144", "64"]
    for name in ("mean reward, first update", "mean reward, last update"):
        assert table[name][0] == table[name][1]
    assert "Largest difference of a mean reward: 0.0000." in result.stdout
    assert is_png(tmp_path / "grpo.png")
    refused = run("grpo.py", "--group-size", "1", "--output-dir", str(tmp_path))
    assert refused.returncode != 0 and "--group-size: expected at least 2 responses" in refused.stderr


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
    result = run("sst2.py", "--data", str(tmp_path), "--output-dir", str(tmp_path))
    assert result.returncode != 0
    assert "expected tab-separated columns with a header that names a column 'label'" in result.stderr


@pytest.fixture
def tiny_causal_lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as ``--model`` takes it, of another family than the examples' own model."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import stories
    import tiny_model

    tokenizer = tiny_model.make_tokenizer(stories.vocabulary())
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pretrained_in(folder: Path) -> Path:
    (pretrained,) = folder.glob("pretrained-*")
    return pretrained


def test_causal_lm_tunes_a_style_and_a_fresh_model_writes_the_same(tmp_path: Path) -> None:
    few = ["--pretraining-steps", "3", "--max-steps", "3", "--batch-size", "4", "--num-virtual-tokens", "5"]
    prompts = ["Anna walked to the", "the"]
    result = run("causal_lm.py", *prompts, *few, "--max-new-tokens", "6", "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr

    table = table_of(result.stdout)
    prefix = 5 * 2 * 2 * 32  # tokens, key and value, heads, head dimension, in the layer without a window
    assert table["trainable parameters"].startswith(f"{prefix:,} (")
    assert table["texts that a fresh model writes alike"] == "2 of 2"
    without = "loss per token on 64 held-out texts, without the prefix"
    assert float(table[without]) != float(table["the same with the prefix"])
    for when in ("before", "after"):
        assert 0 <= float(table[f"gloomy words among those of all moods, {when}"].removesuffix("%")) <= 100
    stored = tmp_path / "task.safetensors"
    assert table["saved task file"] == f"{stored.stat().st_size / 1024:.1f} KiB"
    assert is_png(tmp_path / "style.png")
    assert "3/3" in result.stderr, "the progress bar of Trainer"

    tokenizer = AutoTokenizer.from_pretrained(pretrained_in(tmp_path))
    model = load_prefix_model(AutoModelForCausalLM.from_pretrained(pretrained_in(tmp_path)), stored).eval()
    ids = model.generate(**tokenizer(prompts[0], return_tensors="pt"), do_sample=False, max_new_tokens=6)
    written = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert re.search(rf"^ *with *: {re.escape(written)}$", result.stdout, re.MULTILINE)


def test_causal_lm_takes_a_model_and_texts_of_the_user(
    tmp_path: Path, tiny_causal_lm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "lines.txt"
    # Some have more tokens than the model has positions.
    lengths = range(0, 1000, 100)
    texts.write_text("".join(f"Anna found a bright boat . Leo sang {'all day ' * n}.\n" for n in lengths))
    options = ["--model", str(tiny_causal_lm), "--train-file", str(texts), "--max-steps", "1", "--max-new-tokens", "4"]
    run_here(monkeypatch, "causal_lm.py", "Anna", *options, "--output-dir", str(tmp_path / "run"))
    table = table_of(capsys.readouterr().out)
    assert "loss per token on 2 held-out texts, without the prefix" in table
    assert not any("gloomy" in name for name in table), "moods are counted in the stories alone"
    assert not list((tmp_path / "run").glob("pretrained-*"))


def test_causal_lm_learns_where_a_text_ends_from_a_tokenizer_that_pads_with_the_end(
    tmp_path: Path, tiny_causal_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import causal_lm

    options = ["--max-length", "8", "--batch-size", "2", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *options])
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_lm)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(tiny_causal_lm)
    texts = ["Anna sang", "Anna sang all day . then Hugo sang all day"]
    trainer = causal_lm.make_trainer(model, tokenizer, texts, texts, causal_lm.parse_arguments())
    (batch,) = trainer.get_eval_dataloader()
    end = tokenizer.eos_token_id
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        assert labels[mask == 1].tolist() == ids[mask == 1].tolist()
        assert (labels[mask == 0] == -100).all()
        assert ids[mask == 1].tolist().index(end) == mask.sum() - 1, "one end, the last token of the text"
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenizer(texts[0])["input_ids"]) + 1, 8]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (4, "--train-file: expected at least 5 lines of text, of which one is held out, got 4"),
        (None, "--train-file: expected a file"),
    ],
)
def test_causal_lm_refuses_a_file_without_enough_texts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: int | None,
    expected: str,
) -> None:
    if lines is not None:
        (tmp_path / "lines.txt").write_text("Anna sang .\n\n" * lines)
    with pytest.raises(SystemExit):
        run_here(monkeypatch, "causal_lm.py", "--train-file", str(tmp_path / "lines.txt"))
    assert expected in capsys.readouterr().err


def test_mixed_batch_gives_every_row_what_it_gets_alone(tmp_path: Path) -> None:
    few = ["--pretraining-steps", "3", "--max-steps", "3", "--samples", "2", "--max-new-tokens", "5"]
    result = run("mixed_batch.py", *few, "--num-virtual-tokens", "4", "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr

    table = table_of(result.stdout)
    assert table["rows that write the same alone"] == "6 of 6"
    assert float(table["largest difference of logits"]) < 1e-4
    for row in ("gloomy", "gloomy + sailor", "none"):
        assert table[f"gloomy words, row of {row}"].endswith("%")
    for way in ("one mixed batch", "loop over tasks"):
        assert float(table[f"ms, 4 tasks x 2 rows, {way}"]) > 0
    assert is_png(tmp_path / "mixed_batch.png")

    prefixes = []
    for name in ("cheerful", "gloomy", "sailor", "gardener"):
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            (table_name,) = file.keys()
            prefixes.append(file.get_tensor(table_name))
    assert all(not one.equal(other) for n, one in enumerate(prefixes) for other in prefixes[:n])


def test_cartridge_comes_closer_to_the_document_and_a_fresh_model_writes_the_same(tmp_path: Path) -> None:
    few = ["--pretraining-steps", "30", "--people", "6", "--samples", "20", "--sample-length", "9", "--max-steps", "20"]
    lengths = ["--num-virtual-tokens", "12", "--shorter", "4"]
    result = run("cartridge.py", *few, *lengths, "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr

    rows = table_of(result.stdout, columns=4)
    nothing, document, before, after = (
        rows[name] for name in ("no document", "the document", "12 tokens, untrained", "12 tokens")
    )
    assert float(document[0]) == 0 < float(after[0]) < float(before[0])
    assert float(after[0]) < float(nothing[0])
    bytes_per_token = 2 * 2 * 32 * 4  # key and value, heads, head dimension, float32
    assert after[2] == f"{12 * bytes_per_token / 1024:.1f} KiB", "the layer with a window has no prefix"
    assert rows["4 tokens"][2] == f"{4 * bytes_per_token / 1024:.1f} KiB"
    table = table_of(result.stdout)
    assert table["document"] == f"{1 + 6 * 3 * 3} tokens"
    assert table["a fresh model writes the same"] == "yes"
    assert is_png(tmp_path / "cartridge.png")
    config = PrefixTuningConfig.from_json(
        read_prefix_metadata(tmp_path / "cartridge.safetensors")["prefix_tuning_config"]
    )
    assert (config.num_virtual_tokens, config.num_frozen_tokens, config.layers) == (12, 1, [1])


def test_cartridge_takes_a_model_and_a_document_of_the_user(
    tmp_path: Path, tiny_causal_lm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "report.txt"
    document.write_text("Anna found a bright boat . " * 4)
    few = ["--samples", "5", "--sample-length", "4", "--max-steps", "1", "--num-virtual-tokens", "8", "--shorter", "4"]
    options = ["--model", str(tiny_causal_lm), "--document", str(document), *few]
    run_here(monkeypatch, "cartridge.py", *options, "--output-dir", str(tmp_path / "run"))
    assert float(table_of(capsys.readouterr().out, columns=3)["the document"][0]) == 0


@pytest.mark.parametrize(
    ("option", "expected"),
    [(["--people", "65"], "1 to 64, got 65"), (["--samples", "4"], "at least 5, of which one is held out, got 4")],
)
def test_cartridge_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit):
        run_here(monkeypatch, "cartridge.py", *option)
    assert f"{option[0]}: expected {expected}" in capsys.readouterr().err
