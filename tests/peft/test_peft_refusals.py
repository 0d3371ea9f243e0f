"""PEFT models and calls that accelerate() refuses, each with the reason."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import transformers
from encoder_decoder_families import tiny_bart
from peft_models import config_of, language_model, peft_model
from tiny_models import P, batch, prepared, tiny_model

from prefix_kernels.integrations.peft import accelerate, restore


def test_a_replaced_attention_implementation_cannot_silently_drop_the_prefix() -> None:
    model = accelerate(peft_model("bert"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="implementation is 'sdpa', which would ignore the prefix"):
        model(**batch("bert"))


def test_names_for_each_row_are_refused() -> None:
    model = accelerate(language_model("llama"))
    inputs = batch("llama")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"adapter_names: expected None, got \['default'\]"):
            call(**inputs, adapter_names=["default"])
        with pytest.raises(ValueError, match=r"prefix_names: expected None, got \['default'\]"):
            call(**inputs, prefix_names=["default"])


def changed(model: peft.PeftModel, **settings: object) -> peft.PeftModel:
    for name, value in settings.items():
        setattr(model.peft_config["default"], name, value)
    return model


def without_task() -> peft.PeftModel:
    return peft.PeftModel(tiny_model("bert"), peft.PrefixTuningConfig(num_virtual_tokens=P))


def of_another_class() -> peft.PeftModel:
    model = peft_model("bert")
    model.__class__ = type("Mine", (peft.PeftModelForSequenceClassification,), {})
    return model


def of_mixed_types() -> peft.PeftModel:
    model = peft_model("bert")
    model.peft_config["other"] = peft.PromptTuningConfig(num_virtual_tokens=P)
    return model


def sharing_its_base() -> peft.PeftModel:
    first = language_model("llama")
    second = peft.get_peft_model(first.get_base_model(), config_of("prefix", "CAUSAL_LM"))
    accelerate(first)
    return second


def deberta() -> peft.PeftModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model("deberta-v2", vocab_size=99, **sizes)
    base = transformers.AutoModelForSequenceClassification.from_config(config)
    return peft.get_peft_model(base, config_of("prefix"))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: tiny_model("bert"), TypeError, "expected a peft.PeftModel, got BertForSequenceClassification"),
        (
            lambda: accelerate(peft_model("bert")),
            ValueError,
            r"is accelerated already; restore\(peft_model\) undoes it",
        ),
        (
            lambda: peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(task_type="SEQ_CLS")),
            ValueError,
            "types PREFIX_TUNING, CARTRIDGE, got 'default' of type LORA",
        ),
        (
            lambda: peft.get_peft_model(tiny_model("bert"), peft.PromptTuningConfig("SEQ_CLS", num_virtual_tokens=P)),
            ValueError,
            "types PREFIX_TUNING, CARTRIDGE, got 'default' of type PROMPT_TUNING",
        ),
        (of_mixed_types, ValueError, "types PREFIX_TUNING, CARTRIDGE, got 'other' of type PROMPT_TUNING"),
        (
            without_task,
            ValueError,
            "expected a model with a task_type, got one without; PEFT runs it without its prefix",
        ),
        (of_another_class, TypeError, "expected one of PeftModelForSequenceClassification, .*got Mine"),
        (
            lambda: peft.get_peft_model(
                tiny_bart("bart", transformers.AutoModelForSequenceClassification), config_of("prefix")
            ),
            ValueError,
            "expected num_transformer_submodules=2, .*like BartForSequenceClassification, got 1",
        ),
        (
            lambda: peft.get_peft_model(tiny_bart(encoder_layers=1), config_of("prefix", "SEQ_2_SEQ_LM")),
            ValueError,
            "num_layers: expected at most 1, the layers of PEFT's prefix, got 2",
        ),
        (deberta, ValueError, r"DebertaV2ForSequenceClassification .*does not go through.*AttentionInterface"),
        (sharing_its_base, ValueError, "LlamaForCausalLM below the PEFT model has a prefix already"),
        (
            lambda: peft.get_peft_model(prepared(tiny_model("bert")), config_of("prefix")),
            ValueError,
            "BertForSequenceClassification below the PEFT model has a prefix already",
        ),
        (lambda: changed(peft_model("llama"), num_layers=1), ValueError, "expected num_layers=2.*got 1"),
        (
            lambda: changed(peft_model("llama"), num_attention_heads=4, token_dim=32),
            ValueError,
            "adapter 'default': expected num_attention_heads=2 and token_dim=16.*got 4 and 32",
        ),
    ],
)
def test_what_cannot_be_accelerated_is_refused(build: Callable, error: type[Exception], message: str) -> None:
    model = build()
    with pytest.raises(error, match=message):
        accelerate(model)


def test_only_an_accelerated_model_can_be_restored() -> None:
    with pytest.raises(ValueError, match=r"expected a model of accelerate\(\), got PeftModelForSequenceClassification"):
        restore(peft_model("bert"))
