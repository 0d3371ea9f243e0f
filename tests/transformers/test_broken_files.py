"""Files whose content is wrong: one kind of error, with the path, whoever reads them, and nothing allocated before."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_files import (
    METADATA_READERS,
    NO_JSON,
    NO_SAFETENSORS,
    READERS,
    TASK_READERS,
    NoLargeTensors,
    Reader,
    bert,
    reading_with,
    refused,
    written,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_models import P, prepared, tiny_model
from torch import Tensor

from prefix_kernels.checkpoint import read_prefix_metadata
from prefix_kernels.integrations.transformers import load_prefix_model, save_prefix_model


def stored_task(folder: Path, **settings: object) -> Path:
    (folder / "task").write_bytes(_content_of_task(json.dumps(settings)))
    return folder / "task"


@functools.cache
def _content_of_task(settings: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_prefix_model(prepared(bert(), **json.loads(settings)), Path(folder, "task"), fold=False)
        return Path(folder, "task").read_bytes()


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **metadata: str | None) -> None:
    """Put the file's tensors back with other metadata; None takes a name out."""
    with safe_open(path, framework="pt") as file:
        changed = file.metadata() | metadata
    state = load_file(path) if tensors is None else tensors
    save_file(state, path, metadata={name: value for name, value in changed.items() if value is not None})


def change_config(path: Path, **settings: object) -> None:
    config = json.loads(read_prefix_metadata(path)["prefix_tuning_config"])
    rewrite(path, prefix_tuning_config=json.dumps(config | settings))


# Files that are no safetensors.


@pytest.mark.parametrize("damage", NO_SAFETENSORS.values(), ids=NO_SAFETENSORS)
@reading_with(READERS)
def test_a_file_that_is_no_safetensors_is_refused(
    read: Reader, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = stored_task(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    refused(read, path, "a file written by prefix_kernels.save_prefix", cause=SafetensorError)


@reading_with(READERS)
def test_sizes_that_no_tensor_can_have_are_refused(read: Reader, tmp_path: Path) -> None:
    path = tmp_path / "task"
    path.write_bytes(written({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}))
    refused(read, path, "a: expected sizes up to 1073741823, got [9223372036854775808, 0]")


@reading_with(READERS)
def test_what_is_no_file_is_refused(read: Reader, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(read, tmp_path / "folder", "got a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(read, tmp_path / "pipe", "got something that is no file")


@reading_with(READERS)
def test_a_missing_file_is_said_to_be_missing_by_its_path(read: Reader, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path / "nowhere" / "nothing"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))) as caught:
            read(path)
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("path", [None, 3, b"task", ["task"]])
@reading_with(METADATA_READERS)
def test_what_is_no_path_is_refused(read: Reader, path: object) -> None:
    with pytest.raises(TypeError, match=f"path: expected a str or an os.PathLike, got {type(path).__name__}"):
        read(path)


# Safetensors whose metadata is wrong.


@pytest.mark.parametrize("version", ["²", "one", "", "-1", "1.0", " 1", "9" * 5000, "1\n"])
@reading_with(READERS)
def test_a_format_that_is_no_number_is_refused(read: Reader, version: str, tmp_path: Path) -> None:
    path = stored_task(tmp_path)
    rewrite(path, prefix_kernels_format=version)
    refused(read, path, "got one of the format '")


@pytest.mark.parametrize("heads", [*NO_JSON, "{}", "3", '"classifier"', "null", "[1]", '[["classifier"]]', "[null]"])
@reading_with(READERS)
def test_heads_that_are_no_names_are_refused(read: Reader, heads: str, tmp_path: Path) -> None:
    path = stored_task(tmp_path)
    rewrite(path, heads=heads)
    refused(read, path, "heads: expected", cause=(ValueError, RecursionError) if heads in NO_JSON else None)


CONFIGS = {
    "of another kind": [
        "null",
        "3",
        "[]",
        '"{}"',
        '{"num_virtual_tokens": [[]]}',
        '{"layers": ' + "[" * 500 + "]" * 500 + "}",
    ],
    "with a field that is none": ['{"num_tokens": 5}', '{"": 1}', json.dumps({f"field {i}": i for i in range(10**4)})],
    "with a setting of a wrong type": [
        *('{"num_virtual_tokens": "20"}', '{"num_virtual_tokens": null}', '{"num_virtual_tokens": 5.0}'),
        *('{"num_virtual_tokens": {"self": {}}}', '{"prefix_projection": "no"}', '{"prefix_dropout": NaN}'),
        *('{"layers": [0.5]}', '{"layers": [true]}', '{"modules_to_save": [null]}', '{"inference_mode": 1}'),
        *('{"init_std": Infinity}', '{"position_offset": []}', '{"attention": {}}', '{"target_attentions": [[]]}'),
    ],
    "with a setting out of range": [
        '{"num_virtual_tokens": 0}',
        '{"num_virtual_tokens": 4294967296}',
        '{"layers": []}',
    ],
}


@pytest.mark.parametrize("config", [*NO_JSON, *(config for configs in CONFIGS.values() for config in configs)])
@reading_with(TASK_READERS)
def test_a_stored_config_that_is_none_is_refused(read: Reader, config: str, tmp_path: Path) -> None:
    path = stored_task(tmp_path)
    rewrite(path, prefix_tuning_config=config)
    refused(read, path, "prefix_tuning_config: ", cause=(ValueError, RecursionError) if config in NO_JSON else None)


@pytest.mark.parametrize(
    "settings", [{"layers": [7]}, {"target_attentions": ["cross"]}, {"num_virtual_tokens": {"encoder": P}}]
)
@reading_with(TASK_READERS)
def test_a_stored_config_that_the_model_cannot_have_is_refused(
    read: Reader, settings: dict[str, object], tmp_path: Path
) -> None:
    path = stored_task(tmp_path)
    change_config(path, **settings)
    refused(read, path, f"{next(iter(settings))}: ", cause=ValueError)


@reading_with(TASK_READERS)
def test_a_file_without_a_config_is_refused(read: Reader, tmp_path: Path) -> None:
    path = stored_task(tmp_path)
    rewrite(path, prefix_tuning_config=None)
    refused(read, path, "expected a file of save_prefix_model, got one without a config")


GOOD_LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "problem_type": None}
BAD_LABELS: dict[str, object] = {
    "another kind": [],
    "nothing": {},
    "a missing field": {"id2label": {}, "label2id": {}},
    "a further field": GOOD_LABELS | {"id3label": {}},
    "a list of names": GOOD_LABELS | {"id2label": ["a", "b", "c"]},
    "no names": GOOD_LABELS | {"id2label": None},
    "a name that is no string": GOOD_LABELS | {"id2label": {"0": "a", "1": "b", "2": 2}},
    "a number that is none": GOOD_LABELS | {"id2label": {"0": "a", "1": "b", "²": "c"}},
    "a number that is too long": GOOD_LABELS | {"id2label": {"0": "a", "1": "b", "2" * 5000: "c"}},
    "numbers that are names": GOOD_LABELS | {"label2id": {"a": "0"}},
    "numbers that are truths": GOOD_LABELS | {"label2id": {"a": True}},
    "numbers in a list": GOOD_LABELS | {"label2id": [0, 1, 2]},
    "a problem that is no string": GOOD_LABELS | {"problem_type": 1},
}


@pytest.mark.parametrize(
    "labels", [*NO_JSON, *map(json.dumps, BAD_LABELS.values())], ids=[*map(str, range(5)), *BAD_LABELS]
)
@reading_with(TASK_READERS)
def test_stored_labels_that_are_none_are_refused(read: Reader, labels: str, tmp_path: Path) -> None:
    path = stored_task(tmp_path)
    rewrite(path, labels=labels)
    refused(read, path, "labels: ", cause=(ValueError, RecursionError) if labels in NO_JSON else None)


@pytest.mark.parametrize("count", [0, 2, 4, 1000])
@reading_with(TASK_READERS)
def test_labels_without_an_output_each_are_refused(read: Reader, count: int, tmp_path: Path) -> None:
    """The model's loss would fail, at the first batch that has one of them."""
    path = stored_task(tmp_path)
    names = {str(i): f"label {i}" for i in range(count)}
    rewrite(path, labels=json.dumps({"id2label": names, "label2id": {}, "problem_type": None}))
    refused(
        read, path, f"an output for each of the {count} labels, got classifier.bias with 3, classifier.weight with 3"
    )


@pytest.mark.parametrize("labels", [{0: "no", 1: "yes", 2: "perhaps"}, {0: 0, 1: 1, 2: 2}])
def test_labels_with_an_output_each_are_loaded(labels: dict[int, object], tmp_path: Path) -> None:
    model = prepared(bert())
    model.config.id2label, model.config.label2id = labels, None
    save_prefix_model(model, tmp_path / "task")
    loaded = load_prefix_model(tiny_model("bert"), tmp_path / "task")
    assert loaded.config.id2label == {i: str(name) for i, name in labels.items()}


# Configs that ask for other sizes than the file has tensors for.


OTHER_SIZES = {
    "tokens": (
        {},
        {"num_virtual_tokens": 10**8},
        "prefix_encoder.table: expected shape [100000000, 4, 4, 8], got [5, ",
    ),
    "the most tokens": (
        {},
        {"num_virtual_tokens": 2**30 - 1},
        "expected shape [1073741823, 4, 4, 8], got [5, 4, 4, 8]",
    ),
    "tokens by layer": (
        {},
        {"num_virtual_tokens": [5, 10**8], "position_offset": "none"},
        "missing: prefix_encoder.self.table, prefix_encoder.self_1.table",
    ),
    "a hidden size": (
        {"prefix_projection": True, "encoder_hidden_size": 7},
        {"encoder_hidden_size": 10**9},
        "prefix_encoder.transform.0.weight: expected shape [1000000000, 32], got [7, 32]",
    ),
    "tokens of a projection": (
        {"prefix_projection": True},
        {"num_virtual_tokens": 10**8},
        "prefix_encoder.embedding.weight: expected shape [100000000, 32], got [5, 32]",
    ),
    "frozen tokens": (
        {"num_frozen_tokens": 2},
        {"num_virtual_tokens": 10**8, "num_frozen_tokens": 10**7},
        "prefix_encoder.table: expected shape [90000000, 4, 4, 8], got ",
    ),
    "the largest projection": (
        {"prefix_projection": True},
        {"num_virtual_tokens": 2**30 - 1, "encoder_hidden_size": 2**30 - 1, "init_std": 0.5},
        "prefix_encoder.embedding.weight: expected shape [1073741823, 32], got [5, 32]",
    ),
    "a projection with frozen tokens": (
        {"num_frozen_tokens": 2},
        {"num_virtual_tokens": 10**8, "num_frozen_tokens": 0, "prefix_projection": True, "encoder_hidden_size": 10**9},
        "prefix_encoder.table: expected shape [100000000, 4, 4, 8], got [5, 4, 4, 8]",
    ),
}


@pytest.mark.parametrize(("settings", "believed", "message"), OTHER_SIZES.values(), ids=OTHER_SIZES)
@reading_with(TASK_READERS)
def test_what_a_stored_config_asks_for_is_compared_before_it_is_allocated(
    read: Reader, settings: dict[str, object], believed: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = stored_task(tmp_path, **settings)
    read(path)
    change_config(path, **believed)
    with NoLargeTensors():
        refused(read, path, "expected a prefix that fits BertForSequenceClassification", message)


@reading_with(TASK_READERS)
def test_a_hidden_size_that_no_tensor_has_is_not_believed(read: Reader, tmp_path: Path) -> None:
    """A folded prefix does not need the MLP that its config describes."""
    model = prepared(bert(), prefix_projection=True, encoder_hidden_size=7)
    model.prefix_encoder.fold()
    path = tmp_path / "task"
    save_prefix_model(model, path, fold=False)
    change_config(path, encoder_hidden_size=10**9)
    with NoLargeTensors():
        read(path)
        loaded = load_prefix_model(copy.deepcopy(bert()), path)
    assert torch.equal(loaded.prefix_encoder.table, model.prefix_encoder.table)
    assert (loaded.prefix_tuning_config.prefix_projection, loaded.prefix_tuning_config.encoder_hidden_size) == (
        False,
        None,
    )


@pytest.mark.parametrize(
    ("name", "shape"), [("table", (5, 4, 4, 9)), ("table", ()), ("table", (0,)), ("frozen_table", (2, 4, 4, 9))]
)
@reading_with({"load_prefix": READERS["load_prefix"]} | TASK_READERS)
def test_parts_of_a_prefix_that_do_not_belong_together_are_refused(
    read: Reader, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = stored_task(tmp_path, num_frozen_tokens=2)
    rewrite(path, load_file(path) | {f"prefix_encoder.{name}": torch.zeros(shape)})
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read(path)
    assert f"prefix_encoder.{name}" in str(caught.value) or "missing" in str(caught.value)


@pytest.mark.parametrize("shape", [(), (3,), (3, 32, 1), (2**20, 0)])
def test_a_head_of_a_strange_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = stored_task(tmp_path)
    rewrite(path, load_file(path) | {"classifier.weight": torch.zeros(shape)})
    for read in (TASK_READERS["load_prefix_model"], TASK_READERS["load_named_prefix"]):
        with pytest.raises(ValueError, match=rf"(?s){re.escape(str(path))}.*classifier.weight: expected shape"):
            read(path)
