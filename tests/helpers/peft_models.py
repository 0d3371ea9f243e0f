"""PEFT's models of every family and kind of prefix, and the comparison with the accelerated ones."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from decoder_families import FAMILIES as DECODERS
from encoder_decoder_families import BART, FLAN_T5, MBART, T5
from family_checks import Family
from tiny_models import P, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

KINDS = ("prefix", "projection", "cartridge")
FROZEN = 2


def config_of(kind: str, task_type: str = "SEQ_CLS", length: int = P, **settings: object) -> peft.PeftConfig:
    if kind == "cartridge":
        return peft.CartridgeConfig(
            task_type=task_type, num_virtual_tokens=length, **({"num_frozen_tokens": FROZEN} | settings)
        )
    settings = {"prefix_projection": kind == "projection"} | settings
    return peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=length, **settings)


def peft_model(family: str, kind: str = "prefix", **settings: object) -> peft.PeftModel:
    """PEFT's model for the classification of sequences, in eval mode."""
    return peft.get_peft_model(tiny_model(family, **settings), config_of(kind)).eval()


def language_model(family: str, kind: str = "prefix", **settings: object) -> peft.PeftModel:
    base = tiny_model(family, AutoModelForCausalLM, **settings)
    return peft.get_peft_model(base, config_of(kind, "CAUSAL_LM")).eval()


# Whatever PEFT runs, by its task.
FAMILIES = [*DECODERS, T5, FLAN_T5, BART, MBART]


def of_family(families: list[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


def peft_of_family(family: Family, base: PreTrainedModel) -> peft.PeftModel:
    """PEFT's model, in eval mode."""
    config = config_of("prefix", family.peft_task, **family.peft_settings)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    atol = 1e-5 * max(1.0, expected.detach().abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_outputs(ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Equal logits, losses and gradients of everything that is trained."""
    our_output, their_output = ours(**inputs), theirs(**inputs)
    padding = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    for name in ("loss", "logits", "start_logits", "end_logits", "last_hidden_state"):
        if name in their_output:
            ragged = padding is not None and their_output[name].shape[:2] == padding.shape
            valid = padding.bool() if ragged else ...
            assert_close(our_output[name][valid], their_output[name][valid])
    for output in (our_output, their_output):
        (output.loss if "loss" in output else output[0].tanh().sum()).backward()
    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    assert max(grad.abs().max() for name, grad in expected.items() if name.startswith("prompt_encoder.")) > 1e-2
    for name, grad in gradients(ours).items():
        assert_close(grad, expected[name])


TASKS = {
    "TOKEN_CLS": (AutoModelForTokenClassification, {"labels": torch.arange(21).view(3, 7) % 3}),
    "QUESTION_ANS": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 3, 6])},
    ),
    "FEATURE_EXTRACTION": (AutoModel, {}),
}
