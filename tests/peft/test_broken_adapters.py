"""Folders of PEFT whose content is wrong: one kind of error, with the path, and nothing allocated before."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_files import (
    NO_JSON,
    NO_SAFETENSORS,
    TASK_READERS,
    NoLargeTensors,
    Reader,
    bert,
    prepared_bert,
    reading_with,
    refused,
)
from encoder_decoder_families import tiny_bart
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import P
from torch import Tensor, nn

from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model, load_prefix_model
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import read_peft_checkpoint, save_peft_checkpoint


def settings_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


FOLDER_READERS: dict[str, Reader] = TASK_READERS | {
    "read_peft_checkpoint": lambda path: read_peft_checkpoint(path, bert()),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_peft_checkpoint(prepared_bert(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("config", [*NO_JSON, "[]", "null", '"PREFIX_TUNING"', "3", b"\xff{}"])
@reading_with(FOLDER_READERS)
def test_a_config_of_an_adapter_that_is_none_is_refused(read: Reader, config: str | bytes, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    cause = (ValueError, RecursionError) if config in NO_JSON else None
    refused(read, adapter, "adapter_config.json: expected a JSON object", cause=cause)


@pytest.mark.parametrize(
    "settings",
    [
        *({"peft_type": value} for value in (None, [], {}, 1, "LORA", "x" * 10**5)),
        *({"num_virtual_tokens": value} for value in ("5", 5.0, True, [], -1, 2**30, 10**8, 0, P + 1)),
        *({"num_frozen_tokens": value} for value in ("1", 1.0, True, [], -1, P + 1, 10**30)),
        *({"num_transformer_submodules": value} for value in ("1", 1.0, True, [], 2)),
        *({"modules_to_save": value} for value in ("classifier", {}, 1, [1], [["classifier"]])),
    ],
    ids=str,
)
@reading_with(FOLDER_READERS)
def test_a_wrong_setting_of_an_adapter_is_refused_by_its_name(
    read: Reader, settings: dict[str, object], adapter: Path
) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps(settings_of(adapter) | settings))
    name = next(iter(settings))
    with NoLargeTensors():
        refused(read, adapter, "adapter of the type" if name == "peft_type" else name)


@pytest.mark.parametrize("damage", NO_SAFETENSORS.values(), ids=NO_SAFETENSORS)
@reading_with(FOLDER_READERS)
def test_weights_of_an_adapter_that_are_no_safetensors_are_refused(
    read: Reader, damage: Callable[[bytes], bytes], adapter: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(read, adapter, "adapter_model.safetensors: ", cause=SafetensorError)


NO_TENSORS: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "empty": lambda path, tensors: path.write_bytes(b""),
    "text": lambda path, tensors: path.write_text("weights, but in words"),
    "cut": lambda path, tensors: path.write_bytes(path.read_bytes()[:-300]),
    "half": lambda path, tensors: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "safetensors": lambda path, tensors: save_file(tensors, path),
    "a list": lambda path, tensors: torch.save(list(tensors.values()), path),
    "a tensor": lambda path, tensors: torch.save(tensors["prompt_embeddings"], path),
    "a number for a tensor": lambda path, tensors: torch.save(tensors | {"prompt_embeddings": 3}, path),
    "a name that is none": lambda path, tensors: torch.save(tensors | {3: torch.zeros(2)}, path),
    "a module": lambda path, tensors: torch.save(nn.Linear(2, 2), path),
    "code": lambda path, tensors: torch.save(tensors | {"prompt_embeddings": os.getcwd}, path),
    "a sparse tensor": lambda path, tensors: torch.save(
        tensors | {"prompt_embeddings": torch.eye(5).to_sparse()}, path
    ),
    "a tensor without values": lambda path, tensors: torch.save(
        tensors | {"prompt_embeddings": torch.empty(5, 128, device="meta")}, path
    ),
    "one value for many": lambda path, tensors: torch.save(
        tensors | {"prompt_embeddings": torch.zeros(1).expand(10**8, 128)}, path
    ),
    "integers": lambda path, tensors: torch.save(
        tensors | {"prompt_embeddings": torch.zeros(5, 128, dtype=torch.int64)}, path
    ),
    "no prompt": lambda path, tensors: torch.save({"classifier.weight": torch.zeros(3, 32)}, path),
    "no rows": lambda path, tensors: torch.save(tensors | {"prompt_embeddings": torch.zeros(0, 128)}, path),
}


@pytest.mark.parametrize("damage", NO_TENSORS.values(), ids=NO_TENSORS)
@reading_with(FOLDER_READERS)
def test_pickled_weights_of_an_adapter_that_are_none_are_refused(
    read: Reader, damage: Callable[[Path, dict[str, Tensor]], object], adapter: Path
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    settings = settings_of(adapter) | {"num_virtual_tokens": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    torch.save(tensors, adapter / "adapter_model.bin")
    read(adapter)
    damage(adapter / "adapter_model.bin", tensors)
    with NoLargeTensors():
        refused(read, adapter)


@reading_with(TASK_READERS)
def test_a_folder_without_an_adapter_is_refused(read: Reader, tmp_path: Path) -> None:
    refused(
        read, tmp_path, "expected a file of save_prefix_model, or a folder with PEFT's adapter_config.json, got a fo"
    )


def test_a_table_that_does_not_fit_an_encoder_decoder_is_refused_with_its_path(tmp_path: Path) -> None:
    base = tiny_bart()
    config = PrefixTuningConfig(P, target_attentions=["decoder"])
    save_peft_checkpoint(get_prefix_model(copy.deepcopy(base), config), tmp_path)
    load_prefix_model(copy.deepcopy(base), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for width in (1, 31, 32):
        save_file(load_file(path) | {"prompt_embeddings": torch.zeros(P, width)}, path)
        refused(lambda folder: load_prefix_model(copy.deepcopy(base), folder), tmp_path)
