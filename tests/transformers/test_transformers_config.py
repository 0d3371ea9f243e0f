"""Settings of a wrong type are refused by name, and a preparation that fails leaves the model as it was."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from encoder_decoder_families import tiny_t5
from tiny_models import P, batch, prepared, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_prefix_model,
    remove_prefix,
    save_prefix_model,
)
from prefix_kernels.integrations.transformers import model as preparation
from prefix_kernels.integrations.transformers.hooks import attach
from prefix_kernels.integrations.transformers.storage import stored_task as stored
from prefix_kernels.integrations.transformers.tasks import registry as tasks

NO_INTEGERS = (1.5, None, True, "20", b"20", 1 + 0j, float("nan"), object(), torch.tensor(3))
NO_NUMBERS = (None, True, "0.1", [0.1], 1 + 0j, float("nan"), float("inf"), -1, 10**400, torch.tensor(0.1))
NO_BOOLS = (None, 0, 1, "yes", [], np.bool_(True))
NO_NAMES = (1, 1.5, True, "classifier", b"classifier", [1], [None], [["classifier"]], {"classifier": 1}, object())
BAD_VALUES: dict[str, tuple[object, ...]] = {
    "num_virtual_tokens": (*NO_INTEGERS, 0, -1, 2**30, [], {}, [5.0], [True], ["5"], [[5]], {"self": None}, {1: 5}),
    "num_frozen_tokens": (*NO_INTEGERS, -1, 21, [1]),
    "prefix_projection": NO_BOOLS,
    "encoder_hidden_size": (*(value for value in NO_INTEGERS if value is not None), 0, -1, 2**30, [8]),
    "prefix_dropout": (*NO_NUMBERS, 1.5),
    "init_std": tuple(value for value in NO_NUMBERS if value is not None),
    "modules_to_save": NO_NAMES,
    "target_attentions": (*NO_NAMES, []),
    "layers": (
        0,
        1.5,
        True,
        "1",
        [],
        {},
        [0.5],
        [True],
        ["0"],
        [None],
        [-1],
        [[0]],
        {"self": 0},
        {"self": []},
        {0: [0]},
    ),
    "position_offset": (None, 0, [], {}, "shift", np.array(["peft"])),
    "window_includes_prefix": NO_BOOLS,
    "attention": (None, 0, [], {}, "flash", np.array(["torch"])),
    "inference_mode": NO_BOOLS,
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_a_setting_of_a_wrong_type_or_out_of_range_is_refused_by_its_name(name: str, value: object) -> None:
    others = {"prefix_projection": True} if name == "encoder_hidden_size" else {}
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got .*"):
        PrefixTuningConfig(**(others | {name: value}))


def test_every_setting_is_among_the_bad_ones() -> None:
    assert BAD_VALUES.keys() == PrefixTuningConfig().to_dict().keys()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_virtual_tokens": np.int64(7)}, {"num_virtual_tokens": 7}),
        ({"num_virtual_tokens": {"self": np.arange(5, 6)}}, {"num_virtual_tokens": {"self": [5]}}),
        ({"layers": range(2)}, {"layers": [0, 1]}),
        ({"layers": {"self": (0, np.int32(1))}}, {"layers": {"self": [0, 1]}}),
        ({"modules_to_save": {"classifier": None}.keys()}, {"modules_to_save": ["classifier"]}),
        ({"prefix_dropout": 0, "init_std": np.float32(0.5)}, {"prefix_dropout": 0.0, "init_std": 0.5}),
    ],
)
def test_numbers_and_sequences_of_other_kinds_become_plain_ones(
    settings: dict[str, object], expected: dict[str, object]
) -> None:
    config = PrefixTuningConfig(**settings)
    assert config == PrefixTuningConfig(**expected) == PrefixTuningConfig.from_json(config.to_json())
    assert json.loads(config.to_json()) == PrefixTuningConfig().to_dict() | expected


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"num_virtual_tokens": "20"}', "[" * 10**5, '{"a": 1}'])
def test_json_of_no_config_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        PrefixTuningConfig.from_json(text)


@pytest.mark.parametrize("config", [{"num_virtual_tokens": 5}, "torch", peft.PrefixTuningConfig(num_virtual_tokens=5)])
def test_a_config_of_another_class_is_refused_by_its_class(config: object, tmp_path: Path) -> None:
    base = tiny_model("bert")
    save_prefix_model(prepared(base), tmp_path / "task")
    for prepare in (get_prefix_model, lambda model, config: load_prefix_model(model, tmp_path / "task", config=config)):
        with pytest.raises(
            TypeError, match=f"config: expected a .*PrefixTuningConfig, got a .*{type(config).__name__}"
        ):
            prepare(base, config)


def test_a_config_changed_after_it_was_made_is_checked_again_and_copied() -> None:
    config = PrefixTuningConfig(P, layers=[0])
    model = get_prefix_model(tiny_model("bert"), config)
    config.layers.append(0.5)
    assert model.prefix_tuning_config.layers == [0]
    with pytest.raises(ValueError, match=r"layers: expected an int, got 0.5"):
        get_prefix_model(tiny_model("bert"), config)


# A preparation that fails.


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a preparation changes; values compare by identity where that matters."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, dict):
                found[f"{name}:{attribute}"] = {key: id(one) for key, one in value.items()}
            elif isinstance(value, PreTrainedConfig):
                found[f"{name}:{attribute}"] = id(value), copy.deepcopy(vars(value))
            else:
                found[f"{name}:{attribute}"] = id(value)
    for name, parameter in model.named_parameters():
        found[f"{name} requires a gradient"] = parameter.requires_grad
    return found


STAGES = {
    "the prefix encoder": (preparation.PrefixLayout, "make_encoder"),
    "the division over heads": (preparation, "split_over_heads"),
    "what is trained": (preparation, "mark_only_prefix_as_trainable"),
    "the adapters": (preparation, "peft_adapter_parameters"),
    "the tasks": (tasks.PrefixTasks, "install"),
    "its own config": (attach, "give_own_config"),
    "the attention implementation": (attach, "set_implementation"),
    "the hooks of the stacks": (attach, "UnpackedHint"),
    "the hooks of the layers": (attach.StackHook, "__init__"),
    "all the hooks": (preparation, "install_hooks"),
}
LOADING = STAGES | {
    "the prefix": (preparation, "get_prefix_model"),
    "the labels": (stored.Labels, "give_to"),
    "the values": (stored, "load_prefix"),
}
MODELS = {
    "bert": functools.cache(lambda: tiny_model("bert")),
    "albert": functools.cache(lambda: tiny_model("albert", embedding_size=16)),
    "llama": functools.cache(lambda: tiny_model("llama", AutoModelForCausalLM)),
    "t5": functools.cache(tiny_t5),
}


class Injected(Exception):
    """Raised by the tests alone."""


def fail_at(stage: tuple[object, str], before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage fail, before it has done anything or after all that it does."""
    original = getattr(*stage)

    def failing(*args: object, **kwargs: object) -> None:
        if not before:
            original(*args, **kwargs)
        raise Injected

    monkeypatch.setattr(*stage, failing)


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == set()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_preparation_that_fails_changes_nothing(
    build: Callable[[], PreTrainedModel], stage: tuple[object, str], before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    next(model.parameters()).requires_grad_(False)
    state = snapshot(model)
    with monkeypatch.context() as patches:
        fail_at(stage, before, patches)
        with pytest.raises(Injected):
            get_prefix_model(model, PrefixTuningConfig(P))
    assert_unchanged(model, state)
    remove_prefix(get_prefix_model(model, PrefixTuningConfig(P)))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("stage", LOADING.values(), ids=LOADING)
def test_a_task_that_fails_to_load_changes_nothing(
    stage: tuple[object, str], before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model("bert", num_labels=2)
    task = copy.deepcopy(base)
    task.config.id2label = {0: "no", 1: "yes"}
    save_prefix_model(prepared(task), tmp_path / "task")
    inputs = batch("bert")
    logits, state = base(**inputs).logits, snapshot(base)
    with monkeypatch.context() as patches:
        fail_at(stage, before, patches)
        with pytest.raises(Injected):
            load_prefix_model(base, tmp_path / "task")
    assert_unchanged(base, state)
    assert torch.equal(base(**inputs).logits, logits)
    assert load_prefix_model(base, tmp_path / "task").config.id2label == {0: "no", 1: "yes"}


def test_an_acceleration_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    model = peft.get_peft_model(tiny_model("bert"), config)
    state, kind = snapshot(model), type(model)
    with monkeypatch.context() as patches:
        fail_at((attach.StackHook, "__init__"), False, patches)
        with pytest.raises(Injected):
            accelerate(model)
    assert_unchanged(model, state)
    assert type(model) is kind
    accelerate(model)


def test_the_config_survives_json() -> None:
    config = PrefixTuningConfig(7, prefix_projection=True, modules_to_save=("classifier",), position_offset="none")
    assert PrefixTuningConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"got \['length'\]"):
        PrefixTuningConfig.from_dict({"length": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected at least 1, got 0"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size: expected None without prefix_projection=True, got 8"),
        ({"prefix_dropout": 1.5}, r"prefix_dropout: expected a probability in \[0, 1\], got 1.5"),
        (
            {"modules_to_save": "classifier"},
            "modules_to_save: expected a sequence, got the string 'classifier'",
        ),
        ({"position_offset": "shift"}, r"position_offset: expected one of \('peft', 'none'\), got 'shift'"),
        ({"attention": "flash"}, r"attention: expected one of \('prefix_kernels', 'torch', 'cache'\), got 'flash'"),
    ],
)
def test_a_bad_config_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixTuningConfig(**settings)
