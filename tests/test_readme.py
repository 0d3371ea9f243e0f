"""What README.md shows is true: its Python runs as printed, its links lead somewhere, its commands name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
MODEL = "bert-base-uncased"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A folder that stands for the model of the hub that the README names."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, max_position_embeddings=64
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / MODEL)
    return tmp_path / MODEL


def test_the_python_blocks_run_one_after_another(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "\n".join(blocks("python"))
    assert f'"{MODEL}"' in source
    exec(compile(source.replace(f'"{MODEL}"', repr(str(tiny_bert))), "README.md", "exec"), {})
    assert (tmp_path / "task.safetensors").is_file()


def test_relative_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (CHECKOUT / link).is_file()] == []


def test_both_commands_set_up_an_environment_of_their_own() -> None:
    commands = blocks("sh")
    assert [command.count("\n") for command in commands] == [1, 1], "one line each, to be copied"
    for command, last in zip(commands, ["examples/sst2.py", "pytest"], strict=True):
        steps = command.split(" && ")
        assert steps[0] == "python3 -m venv .venv"
        assert all(step.startswith(".venv/bin/python ") for step in steps[1:])
        assert last in steps[-1]
