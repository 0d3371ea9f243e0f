"""What is trained beside the prefix or instead of parts of it: heads, subsets of layers, LoRA; and training resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tiny_models import LABELS, LAYERS, P, batch, prepared, tiny_model, trainable, without_dropout
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_prefix_model,
    remove_prefix,
    save_prefix_model,
)


def train(model: PreTrainedModel, inputs: dict[str, Tensor], steps: int = 3) -> list[float]:
    """A few steps; what is trainable moves, and nothing else."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    moving = set(trainable(model))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    inputs = {"labels": LABELS} | inputs
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) == (name not in moving), name
    return losses


class OwnHead(nn.Module):
    """A head with parameters, buffers and modules of its own, under a name that the package does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.layers = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layers(self.norm(pooled))


SETTINGS: dict[str, dict[str, object]] = {
    "its own head": {"modules_to_save": ["classifier"]},
    "dropout": {"prefix_dropout": 0.3},
    "a subset of layers": {"layers": [1], "num_virtual_tokens": 4},
    "lengths by layer": {"num_virtual_tokens": [2, 6], "position_offset": "none"},
    "lengths of a subset": {"layers": [1], "num_virtual_tokens": [3], "position_offset": "none"},
    "a projection": {"prefix_projection": True, "encoder_hidden_size": 7},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_trains_and_gives_the_same_model_when_loaded(settings: dict[str, object], tmp_path: Path) -> None:
    base = without_dropout(tiny_model("bert"))
    base.classifier = OwnHead()
    inputs = batch("bert", "right")
    model = prepared(base, **settings)
    losses = train(model, inputs, steps=6)
    assert min(losses[1:]) < losses[0]
    save_prefix_model(model, tmp_path / "task.safetensors")

    fresh = tiny_model("bert")
    fresh.load_state_dict({n: t for n, t in base.state_dict().items() if "classifier" not in n}, strict=False)
    fresh.classifier = OwnHead()
    loaded = load_prefix_model(fresh, tmp_path / "task.safetensors").eval()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    heads = {f"classifier.{name}" for name, _ in OwnHead().named_parameters()}
    assert {name for name in trainable(loaded) if not name.startswith("prefix_encoder.")} == heads
    assert loaded.classifier.norm.num_batches_tracked == 6


def test_no_head_is_trained_if_none_is_named(tmp_path: Path) -> None:
    base = tiny_model("bert")
    model = prepared(base, modules_to_save=())
    train(model, batch("bert"))
    save_prefix_model(model, tmp_path / "task.safetensors")
    loaded = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")
    assert set(trainable(loaded)) == {"prefix_encoder.table"}


def test_a_layer_without_a_prefix_is_the_layer_that_it_was() -> None:
    base = tiny_model("bert")
    model = prepared(base, layers=[1], position_offset="none")
    inputs = batch("bert", "right")
    plain = base.bert(**inputs, output_hidden_states=True).hidden_states
    hidden = model.bert(**inputs, output_hidden_states=True).hidden_states
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[1][valid], plain[1][valid])
    assert (hidden[2] - plain[2])[valid].abs().max() > 1e-2


def test_prefix_dropout_zeroes_entries_in_training_alone() -> None:
    model = prepared(without_dropout(tiny_model("bert")), prefix_dropout=0.5)
    inputs = batch("bert")
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    dropped = torch.stack([key for key, _ in model.prefix_encoder()]).eq(0).float().mean()
    assert 0.3 < dropped < 0.7


LORA = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


def lora_config(family: str) -> peft.LoraConfig:
    targets = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
    return peft.LoraConfig(target_modules=targets[family], **LORA)


def with_both(base: PreTrainedModel, family: str, first: str) -> tuple[PreTrainedModel, peft.PeftModel]:
    """The model with a prefix, and the PEFT model around it."""
    model = copy.deepcopy(base)
    config = PrefixTuningConfig(num_virtual_tokens=P)
    if first == "prefix":
        get_prefix_model(model, config)
        outer = peft.get_peft_model(model, lora_config(family))
        model.prefix_encoder.requires_grad_(True)
        if hasattr(model, "classifier"):
            model.classifier.requires_grad_(True)
    else:
        outer = peft.get_peft_model(model, lora_config(family))
        get_prefix_model(model, config)
    return model, outer


def base_of(family: str) -> PreTrainedModel:
    return without_dropout(tiny_model("bert") if family == "bert" else tiny_model("llama", AutoModelForCausalLM))


def inputs_of(family: str) -> dict[str, Tensor]:
    inputs = batch(family, "left")
    return inputs | {"labels": LABELS if family == "bert" else inputs["input_ids"]}


@pytest.mark.parametrize("first", ["prefix", "lora"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lora_is_trained_beside_the_prefix_and_both_are_stored(family: str, first: str, tmp_path: Path) -> None:
    base, inputs = base_of(family), inputs_of(family)
    model, outer = with_both(base, family, first)
    kinds = {"lora": 4 * LAYERS, "prefix_encoder": 1, "classifier": 2 if family == "bert" else 0}
    for kind, count in kinds.items():
        assert sum(kind in name for name in trainable(model)) == count, kind
    assert sum(kinds.values()) == len(trainable(model))
    losses = train(outer, inputs, steps=5)
    assert losses[-1] < losses[0]
    for parameter in trainable(model).values():
        assert parameter.grad.ne(0).any()

    save_prefix_model(model, tmp_path / "task.safetensors")
    outer.save_pretrained(tmp_path / "lora")
    expected = outer(**inputs).logits
    prefix_first = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")
    prefix_first = peft.PeftModel.from_pretrained(prefix_first, tmp_path / "lora")
    torch.testing.assert_close(prefix_first(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    lora_first = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    load_prefix_model(lora_first.base_model.model, tmp_path / "task.safetensors")
    torch.testing.assert_close(lora_first(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    # Each of them matters.
    with lora_first.disable_adapter():
        assert not torch.allclose(lora_first(**inputs).logits, expected, atol=1e-2)
    remove_prefix(lora_first.base_model.model)
    assert not torch.allclose(lora_first(**inputs).logits, expected, atol=1e-2)


def test_lora_layers_injected_without_a_wrapper_stay_trainable() -> None:
    model = peft.inject_adapter_in_model(lora_config("llama"), tiny_model("llama", AutoModelForCausalLM))
    before = {name for name in trainable(model) if "lora" in name}
    get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=P))
    assert set(trainable(model)) == before | {"prefix_encoder.table"}
    frozen = {name for name in before if "layers.0" in name}
    remove_prefix(model)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=P))
    assert set(trainable(model)) == before - frozen | {"prefix_encoder.table"}


def test_lora_put_in_later_does_not_hinder_the_removal_of_the_prefix() -> None:
    base, inputs = base_of("llama"), inputs_of("llama")
    model, outer = with_both(base, "llama", "prefix")
    remove_prefix(model)
    alone = peft.get_peft_model(copy.deepcopy(base), lora_config("llama"))
    alone.load_state_dict(outer.state_dict())
    torch.testing.assert_close(outer(**inputs).logits, alone(**inputs).logits)


def test_lora_and_prefix_generate_together() -> None:
    base, inputs = base_of("llama"), batch("llama", "left")
    _, outer = with_both(base, "llama", "lora")
    settings = {"max_new_tokens": 6, "do_sample": False}
    tokens = outer.generate(**inputs, **settings)
    assert torch.equal(outer.generate(**inputs, **settings, use_cache=False), tokens)
    assert torch.equal(outer.generate(**inputs, **settings, prefix_names=["default"] * 3), tokens)
    assert not torch.equal(outer.generate(**inputs, **settings, prefix_names=[None] * 3), tokens)


class Sentences(torch.utils.data.Dataset):
    def __init__(self) -> None:
        inputs = batch("bert", "right")
        self.rows = [{name: t[i] for name, t in inputs.items()} | {"labels": LABELS[i]} for i in range(3)] * 4

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def test_training_resumed_from_a_checkpoint_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    base, data = without_dropout(tiny_model("bert")), Sentences()

    def trained(folder: str, resume: Path | None) -> PreTrainedModel:
        model = prepared(base, prefix_projection=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=3,
            learning_rate=0.01,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to=[],
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model.eval()

    straight = trained("straight", None)
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    resumed = trained("resumed", checkpoint)
    for name, parameter in trainable(straight).items():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)

    save_prefix_model(resumed, tmp_path / "released.safetensors")
    released = load_prefix_model(copy.deepcopy(base), tmp_path / "released.safetensors")
    assert not released.prefix_encoder.projection
    inputs = batch("bert")
    torch.testing.assert_close(released(**inputs).logits, straight(**inputs).logits, rtol=1e-4, atol=1e-5)
