"""Accelerated PEFT models with several adapters: what is active is what runs, is trained and is stored."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from image_text_families import text, tiny_gemma3
from peft_models import assert_close, assert_same_outputs, config_of, language_model, peft_model
from safetensors.torch import load_file
from tiny_models import LABELS, P, batch, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from prefix_kernels.integrations.peft import accelerate, restore

# "default" is the first. PEFT does not take cartridges and prefixes beside each other.
ADAPTERS = {"generated": ("projection", 3), "longer": ("prefix", P + 3)}
ORDER = ["generated", "longer", "default", "longer", "generated"]


def with_adapters(model: peft.PeftModel, task_type: str) -> peft.PeftModel:
    for name, (kind, length) in ADAPTERS.items():
        model.add_adapter(name, config_of(kind, task_type, length))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.fixture
def theirs() -> peft.PeftModel:
    return with_adapters(peft_model("bert"), "SEQ_CLS")


def test_each_adapter_has_its_prefix_its_head_and_its_gradients(theirs: peft.PeftModel) -> None:
    ours = accelerate(copy.deepcopy(theirs))
    inputs = batch("bert", "right") | {"labels": LABELS}
    for name in ORDER:
        for model in (theirs, ours):
            model.set_adapter(name)
            model.zero_grad()
        assert_same_outputs(ours, theirs, inputs)
        trained = {n for n, p in ours.named_parameters() if p.grad is not None}
        assert trained and all(f".{name}." in n for n in trained)


def train(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()


def test_adapters_trained_in_turn_are_stored_as_peft_stores_them(theirs: peft.PeftModel, tmp_path: Path) -> None:
    ours = accelerate(copy.deepcopy(theirs))
    inputs = batch("bert", "left") | {"labels": LABELS}
    for model, folder in ((theirs, tmp_path / "theirs"), (ours, tmp_path / "ours")):
        for name in ORDER:
            model.set_adapter(name)
            train(model, inputs)
        model.save_pretrained(folder)
    files = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        expected, stored = (load_file(tmp_path / folder / file) for folder in ("theirs", "ours"))
        assert stored.keys() == expected.keys()
        for name, tensor in stored.items():
            assert_close(tensor, expected[name])


def test_each_adapter_generates_its_own_tokens_also_when_compiled_and_restored() -> None:
    theirs = with_adapters(language_model("llama"), "CAUSAL_LM")
    ours = accelerate(copy.deepcopy(theirs))
    inputs = batch("llama", "left")
    valid = inputs["attention_mask"].bool()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    tokens = []
    for name in ORDER:
        for model in (theirs, ours):
            model.set_adapter(name)
        tokens.append(theirs.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False))
        assert torch.equal(ours.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False), tokens[-1])
        assert_close(compiled(**inputs).logits[valid], theirs(**inputs).logits[valid])
    assert not torch.equal(tokens[0], tokens[1])
    restore(ours).set_adapter("default")
    theirs.set_adapter("default")
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_gemma_3_that_reads_images_is_accelerated() -> None:
    theirs = peft.get_peft_model(tiny_gemma3(), config_of("prefix", "CAUSAL_LM")).eval()
    inputs = text("left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)
    assert_same_outputs(accelerate(copy.deepcopy(theirs)), theirs, inputs | {"labels": labels})


def test_the_active_adapter_is_used_whatever_its_length() -> None:
    theirs = language_model("llama")
    theirs.add_adapter("longer", config_of("projection", "CAUSAL_LM", P + 3))
    ours = accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("added", config_of("prefix", "CAUSAL_LM", 2))
    inputs = batch("llama", "left")
    logits = {}
    for name in ("longer", "added", "default"):
        for model in (theirs, ours):
            model.set_adapter(name)
        logits[name] = ours(**inputs).logits
        assert_close(logits[name], theirs(**inputs).logits)
    assert not torch.allclose(logits["longer"], logits["added"]) and not torch.allclose(
        logits["added"], logits["default"]
    )
    ours.delete_adapter("longer")
    torch.testing.assert_close(ours(**inputs).logits, logits["default"])


def test_an_adapter_loaded_later_is_used(tmp_path: Path) -> None:
    other = peft_model("bert", "projection")
    other.save_pretrained(tmp_path)
    theirs = peft_model("bert")
    ours = accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        model.load_adapter(tmp_path, "other")
        model.set_adapter("other")
    inputs = batch("bert", "right")
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)


def test_a_disabled_adapter_is_not_there() -> None:
    base = tiny_model("llama", AutoModelForCausalLM)
    ours = accelerate(peft.get_peft_model(copy.deepcopy(base), config_of("prefix", "CAUSAL_LM")).eval())
    inputs = batch("llama", "left")
    settings = {"max_new_tokens": 6, "do_sample": False}
    with_prefix, tokens = ours(**inputs).logits, ours.generate(**inputs, **settings)
    valid = inputs["attention_mask"].bool()
    with ours.disable_adapter():
        assert_close(ours(**inputs).logits[valid], base(**inputs).logits[valid])
        assert torch.equal(ours.generate(**inputs, **settings), base.generate(**inputs, **settings))
        with ours.disable_adapter():
            pass
        assert_close(ours(**inputs).logits[valid], base(**inputs).logits[valid])
    assert torch.equal(ours(**inputs).logits, with_prefix)
    assert torch.equal(ours.generate(**inputs, **settings), tokens)
    assert not torch.equal(base.generate(**inputs, **settings), tokens)


def test_an_exception_while_disabled_enables_again() -> None:
    ours = accelerate(peft_model("bert"))
    inputs = batch("bert")
    before = ours(**inputs).logits
    with pytest.raises(ArithmeticError), ours.disable_adapter():
        raise ArithmeticError
    assert torch.equal(ours(**inputs).logits, before)


def test_a_model_whose_adapter_was_disabled_before_can_be_accelerated() -> None:
    theirs = language_model("llama")
    inputs = batch("llama")
    expected = theirs(**inputs).logits
    inside = r"with its adapter enabled, got one inside disable_adapter\(\)"
    with theirs.disable_adapter(), pytest.raises(ValueError, match=inside):
        accelerate(theirs)
    ours = accelerate(theirs)
    assert ours(**inputs, use_cache=True).past_key_values.get_seq_length() == 7
    assert_close(ours(**inputs).logits, expected)


def test_an_adapter_that_does_not_fit_is_refused_when_it_runs() -> None:
    model = accelerate(peft_model("bert"))
    model.add_adapter("shallow", config_of("prefix", num_layers=1))
    model.set_adapter("shallow")
    with pytest.raises(ValueError, match="adapter 'shallow': expected num_layers=2, the layers of the model, got 1"):
        model(**batch("bert"))
