"""Models and calls that the integration refuses, each with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import batch, prepared, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    remove_prefix,
    save_prefix_model,
)


def tiny_deberta() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("deberta-v2", vocab_size=99, **sizes))


def tiny_xlnet() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("xlnet", vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=40)
    )


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "model: expected a transformers.PreTrainedModel, got Linear"),
        (tiny_deberta, ValueError, r"DebertaV2ForSequenceClassification .*does not go through.*AttentionInterface"),
        (tiny_xlnet, ValueError, r"XLNetLMHeadModel .*does not go through Transformers' AttentionInterface"),
        (
            lambda: tiny_model("bert", attn_implementation="eager", output_attentions=True),
            ValueError,
            "output_attentions=True: the attention weights are never formed",
        ),
        (lambda: prepared(tiny_model("bert")), ValueError, "has a prefix already; take it off with remove_prefix"),
    ],
)
def test_a_model_without_support_is_refused_by_name(build: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_prefix_model(build())


def test_a_module_to_save_must_exist() -> None:
    with pytest.raises(ValueError, match=r"modules_to_save: expected names among \['bert', .*got 'score'"):
        get_prefix_model(tiny_model("bert"), PrefixTuningConfig(modules_to_save=["score"]))


def test_attention_weights_are_refused_with_the_reason() -> None:
    model = prepared(tiny_model("bert"))
    with pytest.raises(ValueError, match="output_attentions=True: the attention weights are never formed"):
        model(**batch("bert"), output_attentions=True)


def test_switching_the_attention_implementation_cannot_silently_drop_the_prefix() -> None:
    model = prepared(tiny_model("bert"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="implementation is 'sdpa', which would ignore the prefix"):
        model(**batch("bert"))


def test_a_layer_called_alone_does_not_silently_drop_the_prefix() -> None:
    model = prepared(tiny_model("bert"))
    with pytest.raises(RuntimeError, match="of prefix 1 was called without its prefix"):
        model.bert.encoder.layer[1](torch.randn(1, 3, 32))


def test_saving_needs_a_prefix(tmp_path: Path) -> None:
    for function in (remove_prefix, lambda model: save_prefix_model(model, tmp_path / "task.safetensors")):
        with pytest.raises(ValueError, match="prepared by get_prefix_model, got a plain BertForSequenceClassification"):
            function(tiny_model("bert"))
