"""Accelerated PEFT models with the prefix in the key/value cache, or whose layers are not PEFT's one by one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor

from benchmarks.compatibility.family_trial import inputs_of
from benchmarks.compatibility.model_types import tiny_model
from benchmarks.compatibility.peft_trial import peft_model
from prefix_kernels.integrations.peft import accelerate, restore
from prefix_kernels.integrations.transformers import load_prefix_model
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import save_peft_checkpoint

# Of mllama, PEFT's prefix is in the attentions to images too. Of hrm_text, an attention runs several times.
CACHED = {"bloom": "AttentionInterface", "hrm_text": "calls its stacks several times", "mllama": "attentions to images"}
# An attention that is not in every layer; layers that take their keys from others; a window that only masks have.
UNEVEN = ("recurrent_gemma", "gemma3n_text", "phimoe")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


def _trained(model_type: str) -> peft.PeftModel:
    model = peft_model("causal", model_type)
    torch.manual_seed(3)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(std=0.5)
    return model


def _accelerated(model: peft.PeftModel) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accelerate(copy.deepcopy(model))


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("model_type", "reason"), CACHED.items())
def test_one_warning_says_why_the_prefix_stays_in_the_cache(model_type: str, reason: str) -> None:
    model = _trained(model_type)
    with pytest.warns(
        UserWarning, match=f"(?s){reason}.*every layer concatenates it in every call, as in PEFT"
    ) as seen:
        accelerate(model)
    assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.parametrize("model_type", [*CACHED, *UNEVEN])
def test_the_tokens_are_those_that_peft_generates(model_type: str) -> None:
    theirs = _trained(model_type)
    inputs = inputs_of(theirs.get_base_model(), "none")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "output_logits": True}
    if model_type == "recurrent_gemma":  # PEFT gives its states no prefix to continue from
        settings["use_cache"] = False
    ours, expected = (
        model.generate(**inputs, **settings, return_dict_in_generate=True) for model in (_accelerated(theirs), theirs)
    )
    assert torch.equal(ours.sequences, expected.sequences)
    for actual, logits in zip(ours.logits, expected.logits, strict=True):
        _assert_close(actual, logits)


@pytest.mark.parametrize("model_type", CACHED)
def test_without_its_adapter_a_model_is_the_one_below(model_type: str) -> None:
    theirs = _trained(model_type)
    inputs = inputs_of(theirs.get_base_model(), "right")
    base, expected = theirs.get_base_model()(**inputs).logits, theirs(**inputs).logits
    ours = _accelerated(theirs)
    _assert_close(ours(**inputs).logits, expected)
    _assert_close(ours.get_base_model()(**inputs).logits, base)
    with ours.disable_adapter():
        _assert_close(ours(**inputs).logits, base)
    cache = ours(**inputs, use_cache=True).past_key_values
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    restore(ours)
    assert type(ours) is type(theirs)
    _assert_close(ours(**inputs).logits, expected)


def test_gradient_checkpointing_trains_the_prefix_in_the_cache() -> None:
    model = _accelerated(_trained("bloom"))
    inputs = inputs_of(model.get_base_model(), "right")
    (table,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    grads = []
    for checkpoints in (False, True):
        if checkpoints:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        logits = model.train()(**inputs).logits
        grads += torch.autograd.grad(logits.square().sum(), [table])
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5 * grads[0].abs().max().item())


@pytest.mark.parametrize("model_type", ["bloom", "hrm_text", *UNEVEN])
def test_a_checkpoint_of_peft_is_read_by_layers_of_the_cache(model_type: str, tmp_path: Path) -> None:
    theirs = _trained(model_type)
    theirs.save_pretrained(tmp_path / "peft")
    inputs = inputs_of(theirs.get_base_model(), "right")
    expected = theirs(**inputs).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = load_prefix_model(tiny_model("causal", model_type), tmp_path / "peft")
    mask = inputs["attention_mask"][..., None]
    _assert_close(ours(**inputs).logits * mask, expected * mask)

    save_peft_checkpoint(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_model("causal", model_type), tmp_path / "ours").eval()
    _assert_close(again(**inputs).logits * mask, expected * mask)


def test_a_checkpoint_with_prefixes_for_images_is_refused(tmp_path: Path) -> None:
    _trained("mllama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attentions to text alone, which PEFT also gives to those to images"):
        load_prefix_model(tiny_model("causal", "mllama"), tmp_path)
