"""LoRA and DoRA of PEFT beside the prefix, on whole and on quantised weights, against attention with torch.cat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from eager_prefix import eager_prefix
from tiny_models import LABELS, LAYERS, P, batch, tiny_model, trainable, without_dropout
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, TorchAoConfig

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_prefix_model,
    prefix_layers,
    remove_prefix,
    save_prefix_model,
)

AUTO_CLASSES = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
# The number of parameters for each of two projections in each layer: A and B, for DoRA its magnitudes too.
COUNTS = {"lora": 4 * LAYERS, "dora": 6 * LAYERS}


def base_of(family: str, quantized: bool, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = without_dropout(tiny_model(family, AUTO_CLASSES[family]))
    if quantized:
        quantization = pytest.importorskip("torchao.quantization")
        model.save_pretrained(folder / "base")
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["classifier", "lm_head"])
        model = AUTO_CLASSES[family].from_pretrained(folder / "base", quantization_config=config)
    return without_dropout(model.eval())


def adapter(family: str, kind: str) -> peft.LoraConfig:
    settings = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "use_dora": kind == "dora"}
    return peft.LoraConfig(target_modules=TARGETS[family], **settings)


def prefix() -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=P, position_offset="none")


def prefix_first(base: PreTrainedModel, config: peft.LoraConfig) -> PreTrainedModel:
    model = get_prefix_model(base, prefix())
    peft.get_peft_model(model, config)
    # PEFT freezes what was trained before.
    for name in ("prefix_encoder", "classifier"):
        if hasattr(model, name):
            model.get_submodule(name).requires_grad_(True)
    return model


def adapter_first(base: PreTrainedModel, config: peft.LoraConfig) -> PreTrainedModel:
    peft.get_peft_model(base, config)
    return get_prefix_model(base, prefix())


def injected_after(base: PreTrainedModel, config: peft.LoraConfig) -> PreTrainedModel:
    model = peft.inject_adapter_in_model(config, get_prefix_model(base, prefix()))
    for name in ("prefix_encoder", "classifier"):
        if hasattr(model, name):
            model.get_submodule(name).requires_grad_(True)
    return model


def injected_before(base: PreTrainedModel, config: peft.LoraConfig) -> PreTrainedModel:
    return get_prefix_model(peft.inject_adapter_in_model(config, base), prefix())


def inputs_of(family: str) -> dict[str, Tensor]:
    inputs = batch(family, "left")
    return inputs | {"labels": LABELS if family == "bert" else inputs["input_ids"]}


def visible(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return logits[inputs["attention_mask"].bool()] if logits.dim() == 3 else logits


def with_concatenation(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of ``model`` if its attention is written out, with a prefix of the same values."""
    plain = copy.deepcopy(model)
    table = plain.prefix_encoder.table.detach().clone().requires_grad_(True)
    attentions = prefix_layers(plain)
    remove_prefix(plain)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    # The table is [P, 2 * layers, Hkv, D]: keys and values of each layer in turn.
    pairs = {
        plain.get_submodule(name): [tuple(table[:, 2 * layer + which].transpose(0, 1) for which in (0, 1))]
        for layer, name in enumerate(attentions)
    }
    with eager_prefix(plain, pairs):
        output = plain(**inputs)
        output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable(plain).items()}
    return output.logits, gradients | {"prefix_encoder.table": table.grad}


each_family = pytest.mark.parametrize("family", AUTO_CLASSES)
each_kind = pytest.mark.parametrize("kind", COUNTS)
each_base = pytest.mark.parametrize("quantized", [False, True], ids=["whole", "quantised"])


@pytest.mark.parametrize("make", [prefix_first, adapter_first, injected_after, injected_before])
@each_base
@each_kind
@each_family
def test_both_are_trained_with_the_gradients_of_concatenation(
    family: str, kind: str, quantized: bool, make: Callable, tmp_path: Path
) -> None:
    model = make(base_of(family, quantized, tmp_path), adapter(family, kind))
    assert sum("lora" in name for name in trainable(model)) == COUNTS[kind]
    inputs = inputs_of(family)
    output = model(**inputs)
    output.loss.backward()
    logits, gradients = with_concatenation(model, inputs)
    torch.testing.assert_close(visible(output.logits, inputs), visible(logits, inputs), rtol=1e-4, atol=1e-5)
    assert set(gradients) == set(trainable(model))
    for name, parameter in trainable(model).items():
        assert gradients[name].abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    assert model.prefix_encoder.table.grad.ne(0).all()


@pytest.mark.parametrize("make", [prefix_first, adapter_first])
@each_base
@each_kind
@each_family
def test_both_are_stored_and_loaded_in_either_order(
    family: str, kind: str, quantized: bool, make: Callable, tmp_path: Path
) -> None:
    base, inputs = base_of(family, quantized, tmp_path), inputs_of(family)
    model = get_prefix_model(copy.deepcopy(base), prefix()) if make is prefix_first else copy.deepcopy(base)
    outer = peft.get_peft_model(model, adapter(family, kind))
    if make is adapter_first:
        get_prefix_model(model, prefix())
    expected = outer(**inputs).logits
    save_prefix_model(model, tmp_path / "task.safetensors")
    outer.save_pretrained(tmp_path / "adapter")

    first = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")
    first = peft.PeftModel.from_pretrained(first, tmp_path / "adapter")
    last = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    load_prefix_model(last.base_model.model, tmp_path / "task.safetensors")
    for loaded in (first, last):
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(**inputs).logits, expected, atol=1e-2)


@each_kind
@each_family
def test_the_adapter_is_merged_and_the_prefix_stays(family: str, kind: str, tmp_path: Path) -> None:
    base, inputs = base_of(family, False, tmp_path), inputs_of(family)
    model = get_prefix_model(base, prefix())
    outer = peft.get_peft_model(model, adapter(family, kind))
    expected = outer(**inputs).logits
    merged = outer.merge_and_unload()
    assert merged is model and not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    names = prefix_layers(merged)
    assert len(names) == LAYERS and all(isinstance(merged.get_submodule(name), nn.Module) for name in names)
    assert not torch.allclose(remove_prefix(merged)(**inputs).logits, expected, atol=1e-2)


@each_kind
def test_a_merged_quantised_model_keeps_the_prefix(kind: str, tmp_path: Path) -> None:
    """Merged weights are quantised anew, which rounds them again."""
    model = get_prefix_model(base_of("llama", True, tmp_path), prefix())
    outer = peft.get_peft_model(model, adapter("llama", kind))
    inputs = inputs_of("llama")
    expected = visible(outer(**inputs).logits, inputs)
    merged = outer.merge_and_unload()
    assert merged is model
    assert (visible(merged(**inputs).logits, inputs) - expected).norm() < 0.05 * expected.norm()
    alone = visible(remove_prefix(merged)(**inputs).logits, inputs)
    assert (alone - expected).norm() > 0.2 * expected.norm()


@each_kind
def test_generation_with_both_is_that_of_full_recomputation(kind: str, tmp_path: Path) -> None:
    model = adapter_first(base_of("llama", True, tmp_path), adapter("llama", kind))
    inputs, settings = batch("llama", "left"), {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, use_cache=False), tokens)
    assert torch.equal(model.generate(**inputs, **settings, prefix_names=["default"] * 3), tokens)
    assert not torch.equal(model.generate(**inputs, **settings, prefix_names=[None] * 3), tokens)
