"""Prefixes whose first tokens are not trained: seen, stored and loaded with the others, and never moved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import LABELS, P, batch, prepared, tiny_model, trainable, without_dropout
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM, PreTrainedModel
from two_processes import WORLD, run_on_two_processes

from prefix_kernels import PrefixEncoder, load_prefix, prefix_state_dict
from prefix_kernels.distributed import PrefixParallel
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_named_prefix,
    initialize_from_prefix,
    initialize_from_text,
    load_named_prefix,
    load_prefix_model,
    save_prefix_model,
    set_prefix,
)

FROZEN = 2
SETTINGS: dict[str, dict[str, object]] = {
    "all layers": {},
    "all tokens": {"num_frozen_tokens": P},
    "one layer": {"layers": [1]},
    "lengths by layer": {"num_virtual_tokens": [FROZEN, 6], "position_offset": "none"},
    "dropout": {"prefix_dropout": 0.3},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def with_frozen_tokens(base: PreTrainedModel, **settings: object) -> PreTrainedModel:
    return prepared(base, **({"num_frozen_tokens": FROZEN} | settings))


def encoders(model: PreTrainedModel) -> list[PrefixEncoder]:
    encoder = model.prefix_encoder
    return [encoder] if isinstance(encoder, PrefixEncoder) else list(encoder.values())


def full_tables(model: PreTrainedModel) -> list[Tensor]:
    return [encoder.full_table().detach().clone() for encoder in encoders(model)]


def train(model: PreTrainedModel, inputs: dict[str, Tensor], steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("attention", ["prefix_kernels", "torch"])
@each_setting
def test_training_moves_all_tokens_but_the_frozen_ones(settings: dict[str, object], attention: str) -> None:
    model = with_frozen_tokens(without_dropout(tiny_model("bert")), attention=attention, **settings)
    model.prefix_encoder.requires_grad_(True)  # as after PEFT has frozen everything
    before = full_tables(model)
    losses = train(model, batch("bert", "right"))
    assert losses[-1] < losses[0]
    frozen = settings.get("num_frozen_tokens", FROZEN)
    for table, old in zip(full_tables(model), before, strict=True):
        assert torch.equal(table[:frozen], old[:frozen])
        assert table[frozen:].ne(old[frozen:]).all()


def test_frozen_tokens_are_seen_and_the_gradients_of_the_others_are_the_same() -> None:
    base, inputs = tiny_model("llama"), batch("llama", "left")
    model, whole = with_frozen_tokens(base), prepared(base)
    load_prefix(whole, prefix_state_dict(model))
    for one in (model, whole):
        one(**inputs, labels=LABELS).loss.backward()
    torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)
    torch.testing.assert_close(model.prefix_encoder.table.grad, whole.prefix_encoder.table.grad[FROZEN:])
    assert set(trainable(model)) == set(trainable(whole))


@pytest.mark.parametrize("fold", [True, False])
@each_setting
def test_a_saved_task_gives_the_same_model_with_the_same_tokens_frozen(
    settings: dict[str, object], fold: bool, tmp_path: Path
) -> None:
    base, inputs = tiny_model("bert"), batch("bert", "left")
    model = with_frozen_tokens(base, **settings)
    train(model, inputs)
    save_prefix_model(model, tmp_path / "task.safetensors", fold=fold)
    loaded = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors").eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    for one, other in zip(encoders(loaded), encoders(model), strict=True):
        assert one.num_frozen_tokens == other.num_frozen_tokens
        assert torch.equal(one.frozen_table, other.frozen_table)


@pytest.mark.parametrize(("stored", "loaded"), [(2, 0), (0, 2), (1, 3), (2, P)])
def test_a_stored_task_is_loaded_with_more_or_fewer_tokens_frozen(stored: int, loaded: int, tmp_path: Path) -> None:
    base, inputs = tiny_model("bert"), batch("bert")
    model = with_frozen_tokens(base, num_frozen_tokens=stored)
    save_prefix_model(model, tmp_path / "task")
    config = PrefixTuningConfig(P, num_frozen_tokens=loaded)
    again = load_prefix_model(copy.deepcopy(base), tmp_path / "task", config=config)
    assert again.prefix_encoder.table.shape[0] == P - loaded
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_resumed_training_goes_on_from_the_state_dict() -> None:
    model, other = (with_frozen_tokens(tiny_model("bert")) for _ in range(2))
    assert {name for name in model.state_dict() if "prefix" in name} == {
        "prefix_encoder.table",
        "prefix_encoder.frozen_table",
    }
    other.load_state_dict(model.state_dict())
    assert torch.equal(full_tables(other)[0], full_tables(model)[0])


@pytest.mark.parametrize("lengths", [P, [3, 6]], ids=["one length", "lengths by layer"])
def test_frozen_tokens_begin_as_those_of_the_text(lengths: int | list[int]) -> None:
    base, text = tiny_model("llama", AutoModelForCausalLM), torch.randint(3, 97, (9,))
    settings = {"num_virtual_tokens": lengths, "position_offset": "none"}
    model, whole = with_frozen_tokens(base, **settings), prepared(base, **settings)
    parameters = list(model.prefix_encoder.parameters())
    for one in (model, whole):
        initialize_from_text(one, text)
    for table, expected in zip(full_tables(model), full_tables(whole), strict=True):
        assert torch.equal(table, expected)
    assert all(a is b for a, b in zip(parameters, model.prefix_encoder.parameters(), strict=True))


def test_another_prefix_is_the_beginning_wherever_its_tokens_are_frozen(tmp_path: Path) -> None:
    base = tiny_model("bert")
    other = with_frozen_tokens(base, num_frozen_tokens=3)
    save_prefix_model(other, tmp_path / "other")
    for source in (other, tmp_path / "other"):
        model = with_frozen_tokens(base)
        initialize_from_prefix(model, source)
        assert torch.equal(full_tables(model)[0], full_tables(other)[0])


def test_frozen_tokens_of_a_named_task_are_seen_as_they_are_now(tmp_path: Path) -> None:
    base, inputs = tiny_model("llama", AutoModelForCausalLM), batch("llama")
    save_prefix_model(with_frozen_tokens(base, num_virtual_tokens=3, num_frozen_tokens=3), tmp_path / "task")
    model = prepared(base)
    load_named_prefix(model, "task", tmp_path / "task")
    names = ["task", None, "task"]
    model.prefix_encoder.requires_grad_(False)
    with torch.no_grad():
        before = model(**inputs, prefix_names=names).logits
        get_named_prefix(model, "task").frozen_table.mul_(2)
        mixed = model(**inputs, prefix_names=names).logits
        set_prefix(model, "task")
        alone = model(**inputs).logits
    assert not torch.allclose(mixed[0], before[0], atol=1e-2)
    torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frozen_tokens": 6}, "num_frozen_tokens: expected 0 to 5, the length of the shortest prefix, got 6"),
        ({"num_frozen_tokens": -1}, "num_frozen_tokens: expected 0 to 5, the length of the shortest prefix, got -1"),
        (
            {"num_virtual_tokens": [5, 2], "position_offset": "none", "num_frozen_tokens": 3},
            "num_frozen_tokens: expected 0 to 2, the length of the shortest prefix, got 3",
        ),
        (
            {"prefix_projection": True, "num_frozen_tokens": 1},
            r"num_frozen_tokens: expected 0 with prefix_projection=True \(every token moves with the MLP .*\), got 1",
        ),
    ],
)
def test_numbers_of_frozen_tokens_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixTuningConfig(**({"num_virtual_tokens": P} | settings))


def _check_tensor_parallel() -> None:
    torch.manual_seed(0)
    whole = PrefixEncoder(P, 2, 4, 8, num_frozen_tokens=FROZEN)
    split = parallelize_module(copy.deepcopy(whole), init_device_mesh("cpu", (WORLD,)), PrefixParallel())
    rank = torch.distributed.get_rank()
    assert split.frozen_table.to_local().shape == (FROZEN, 4, 2, 8)
    for own, pair in zip(split(), whole(), strict=True):
        for x, expected in zip(own, pair, strict=True):
            assert torch.equal(x, expected[2 * rank : 2 * rank + 2])
    for encoder in (split, whole):
        sum(x.square().sum() for pair in encoder() for x in pair).backward()
    torch.testing.assert_close(split.table.grad.full_tensor(), whole.table.grad)

    other = nn.ModuleDict({"prefix": PrefixEncoder(P, 2, 4, 8)})
    load_prefix(nn.ModuleDict({"prefix": split}), prefix_state_dict(other))
    assert torch.equal(split.full_table().full_tensor(), other["prefix"].table)


def test_frozen_tokens_are_divided_over_heads_like_the_others(tmp_path: Path) -> None:
    run_on_two_processes(_check_tensor_parallel, tmp_path)
