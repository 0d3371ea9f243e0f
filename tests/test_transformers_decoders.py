"""Decoders of text with a prefix: tiny random models of every family."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from family_checks import (
    P,
    Family,
    check_activation_checkpointing,
    check_against_eager,
    check_against_peft,
    check_bfloat16,
    check_compiled,
    check_generation,
    check_training,
    prepared,
    tables,
    with_peft,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LENGTH, WINDOW = 9, 4
PAD, FIRST_TOKEN, VOCABULARY = 0, 3, 99


def tiny(model_type: str, settings: dict[str, object], **more: object) -> PreTrainedModel:
    """A random model whose weights are large enough for every gradient to matter, in eval mode."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    others = {"max_position_embeddings": 64, "initializer_range": 0.3, "attention_dropout": 0.1}
    config = AutoConfig.for_model(model_type, **(sizes | tokens | others | settings | more))
    model = AutoModelForCausalLM.from_config(config).eval()
    # Transformers does not know it of a GPT2LMHeadModel, and says so where a compiled model cannot.
    model.loss_type = "ForCausalLM"
    return model


def batch(padding: str) -> dict[str, Tensor]:
    """Three rows of up to nine tokens; with ``padding`` the second has six and the third three."""
    input_ids = torch.randint(FIRST_TOKEN, VOCABULARY, (3, LENGTH))
    if padding == "none":
        return {"input_ids": input_ids}
    attention_mask = torch.ones_like(input_ids)
    for row, absent in enumerate([0, 3, 6]):
        where = slice(LENGTH - absent, LENGTH) if padding == "right" else slice(0, absent)
        attention_mask[row, where] = 0
        input_ids[row, where] = PAD
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def labels(inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    # What comes first is predicted by padding on its left, where no model's output means anything.
    first = mask.cumsum(1) == 1
    return inputs["input_ids"].masked_fill((mask == 0) | first, -100)


def family(name: str, **settings: object) -> Family:
    model = functools.partial(tiny, name, settings)
    return Family(name, model, batch, labels, peft_task="CAUSAL_LM", learning_rate=0.3)


GROUPED = {"num_key_value_heads": 2}
# One layer of each kind.
MIXED = GROUPED | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = [
    family("gpt2", attn_pdrop=0.1),
    family("gpt_neox"),
    family("opt", ffn_dim=48, word_embed_proj_dim=32, init_std=0.3, dropout=0.0),
    family("llama", **GROUPED),
    family("mistral", sliding_window=WINDOW, **GROUPED),
    family("qwen2", use_sliding_window=True, **MIXED),
    family("qwen3", use_sliding_window=True, head_dim=8, **MIXED),
    # PEFT runs the model's own attention, of which only this one has the softcap.
    family("gemma2", head_dim=8, attn_logit_softcapping=3.0, attn_implementation="eager", **MIXED),
    family("gemma3_text", head_dim=8, **MIXED),
    family("phi", qk_layernorm=True, **GROUPED),
    family("phi3", sliding_window=WINDOW, **GROUPED),
]
MIXED_FAMILIES = ("qwen2", "qwen3", "gemma2", "gemma3_text")
SLIDING = [one for one in FAMILIES if one.name in (*MIXED_FAMILIES, "mistral", "phi3")]


def of_each(families: list[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families, ids=lambda one: one.name)


paddings = pytest.mark.parametrize("padding", ["none", "right", "left"])


@paddings
@of_each(FAMILIES)
def test_logits_and_prefix_gradients_are_those_of_peft(family: Family, padding: str) -> None:
    check_against_peft(family, padding, window_includes_prefix=True)


@paddings
@of_each(FAMILIES)
def test_logits_and_prefix_gradients_are_those_of_the_oracle(family: Family, padding: str) -> None:
    check_against_eager(family, padding)


@of_each(FAMILIES)
def test_a_prefix_is_trained_and_nothing_else(family: Family) -> None:
    check_training(family)


@pytest.mark.parametrize("projection", [False, True], ids=["table", "projection"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@of_each(FAMILIES)
def test_activation_checkpointing_gives_the_same_gradients(
    family: Family, use_reentrant: bool, projection: bool
) -> None:
    check_activation_checkpointing(family, use_reentrant, projection)


@of_each(FAMILIES)
def test_generated_tokens_are_those_of_full_recomputation(family: Family) -> None:
    check_generation(family)


@of_each(SLIDING)
def test_generated_tokens_are_those_of_full_recomputation_where_the_prefix_slides(family: Family) -> None:
    check_generation(family, window_includes_prefix=True)


@of_each(FAMILIES)
def test_a_compiled_model_is_one_graph_and_gives_the_same(family: Family) -> None:
    one_of_each_kind = 2 if family.name in MIXED_FAMILIES else 1
    model = functools.partial(family.model, num_hidden_layers=one_of_each_kind)
    check_compiled(dataclasses.replace(family, model=model))


@of_each(FAMILIES)
def test_a_bfloat16_model_and_autocast_take_a_float32_prefix(family: Family) -> None:
    check_bfloat16(family)
