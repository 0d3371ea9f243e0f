"""Settings and calls that a prefix in the key/value cache cannot serve, and the warnings (``attention="cache"``)."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from cached_prefixes import prepared

from benchmarks.compatibility.family_trial import inputs_of
from benchmarks.compatibility.model_types import tiny_model


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


def test_padding_that_takes_room_in_a_window_is_warned_of() -> None:
    model = prepared(tiny_model("causal", "gemma4_text"))
    with pytest.warns(UserWarning, match="padding on the left of the sequence takes room in the sliding windows"):
        model(**inputs_of(model, "left"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs_of(model, "right"))
        prepared(tiny_model("causal", "gptj"))(**inputs_of(model, "left"))


def test_the_choice_is_made_with_a_warning_that_says_what_it_costs() -> None:
    with pytest.warns(UserWarning, match=r"BloomForCausalLM .*attention='cache'.*concatenates it in every call"):
        prepared(tiny_model("causal", "bloom"), attention="prefix_kernels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(tiny_model("causal", "bloom"))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        (
            "gptj",
            {"num_virtual_tokens": [4, 5], "position_offset": "none"},
            "num_virtual_tokens: expected one length, because",
        ),
        ("gptj", {"layers": [0]}, r"layers: expected all layers, because .*got \[0\]"),
        ("gpt_neo", {"window_includes_prefix": False}, "window_includes_prefix: expected True, because"),
        ("bloom", {"position_offset": "none"}, "position_offset: expected 'peft', because .*no position_ids"),
        ("bloom", {"attention": "torch"}, "BloomForCausalLM .*does not go through Transformers' AttentionInterface"),
        ("jamba", {}, "JambaForCausalLM has layers with another state than keys and values"),
        ("hrm_text", {"layers": [0]}, r"layers: expected all layers, because .*got \[0\]"),
        (
            "hrm_text",
            {"attention": "torch"},
            "HrmTextForCausalLM .*is not supported: it calls its stacks several times",
        ),
    ],
)
def test_settings_that_a_cache_cannot_serve_are_refused(
    model_type: str, settings: dict[str, object], message: str
) -> None:
    base = tiny_model("causal", model_type)
    with pytest.raises(ValueError, match=message):
        prepared(base, **settings)


def test_attentions_that_share_a_layer_of_the_cache_are_refused() -> None:
    base = tiny_model("causal", "gptj")
    base.transformer.h[1].attn.layer_idx = 0
    with pytest.raises(
        ValueError, match=r"expected attentions with a layer of the cache for each, got layers \[0, 0\]"
    ):
        prepared(base)


def test_a_decoder_that_reads_sound_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a forward that takes input_ids or inputs_embeds and attention_mask"):
        prepared(tiny_model("speech seq2seq", "speecht5"))


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="DebertaForMaskedLM takes no key/value cache that could hold a prefix"):
        prepared(tiny_model("masked", "deberta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"past_key_values": ((torch.zeros(2, 4, 1, 8),) * 2,) * 2},
            "(past_key_values|cache): expected a transformers.Cache",
        ),
        (
            {"attention_mask": {"sliding_attention": None}},
            "attention_mask: expected a tensor of two or four dimensions",
        ),
    ],
)
def test_calls_that_cannot_be_understood_are_refused(arguments: dict[str, object], message: str) -> None:
    model = prepared(tiny_model("causal", "gptj"))
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.full((2, 3), 5), **arguments)


def test_texts_that_do_not_fit_beside_the_prefix_are_refused() -> None:
    model = prepared(tiny_model("causal", "gpt_neo"))
    assert model(input_ids=torch.full((1, 60), 5)).logits.isfinite().all()
    with pytest.raises(ValueError, match="input_ids: 61 tokens do not fit: .*leaves 60 of the model's positions"):
        model(input_ids=torch.full((1, 61), 5))


def test_keys_of_another_shape_than_the_module_told_are_refused() -> None:
    model = prepared(tiny_model("causal", "gptj"))
    with torch.no_grad():
        model.prefix_encoder.table = torch.nn.Parameter(torch.zeros(4, 4, 2, 8))
    with pytest.raises(ValueError, match=r"GPTJForCausalLM: transformer.h.0.attn: expected keys of 2 heads"):
        model(input_ids=torch.full((1, 3), 5))


def test_masks_of_four_dimensions_get_columns_for_the_prefix() -> None:
    model = prepared(tiny_model("causal", "gptj"))
    inputs = inputs_of(model, "right")
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    actual = model(input_ids=inputs["input_ids"], attention_mask=mask).logits
    weights = inputs["attention_mask"][..., None]
    torch.testing.assert_close(actual * weights, model(**inputs).logits * weights)
