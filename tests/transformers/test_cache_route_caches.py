"""Caches of callers and of ``generate``, where the prefix lies before what they hold (``attention="cache"``)."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from cached_prefixes import check_equal, from_own_cache, prepared
from transformers import DynamicCache, EncoderDecoderCache

from benchmarks.compatibility.family_trial import inputs_of
from benchmarks.compatibility.model_types import tiny_model


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


@pytest.mark.parametrize(
    ("model_type", "cache"),
    [(name, cache) for name in ("bloom", "gptj", "falcon", "gemma4_text") for cache in (None, "static")][:-1],
)
def test_generated_tokens_have_the_largest_logits(model_type: str, cache: str | None) -> None:
    base = tiny_model("causal", model_type)
    model = prepared(base)
    inputs = inputs_of(base, "none" if model_type == "gemma4_text" else "left")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, cache_implementation=cache)
    for row in range(2):
        begin = int((inputs["attention_mask"][row] == 0).sum())
        one = {"input_ids": tokens[row : row + 1, begin:], "attention_mask": torch.ones(1, 14 - begin)}
        with torch.no_grad():
            scores = from_own_cache(base, model, one)[0, 8 - begin : -1].log_softmax(-1)
        chosen = scores.gather(1, tokens[row, 9:, None])[:, 0]
        torch.testing.assert_close(chosen, scores.amax(1))


def test_a_static_cache_serves_a_model_that_names_the_kinds_of_its_layers() -> None:
    model = prepared(tiny_model("causal", "qwen3"))
    inputs = inputs_of(model, "left")
    search = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **search)
    assert torch.equal(model.generate(**inputs, **search, cache_implementation="static"), expected)


@pytest.mark.parametrize("model_type", ["gemma4_text", "mistral"])
def test_a_static_cache_beside_windows_is_refused(model_type: str) -> None:
    model = prepared(tiny_model("causal", model_type))
    with pytest.raises(ValueError, match="past_key_values: expected a cache that grows.*got a StaticCache"):
        model.generate(**inputs_of(model, "none"), max_new_tokens=5, cache_implementation="static")


@pytest.mark.parametrize("model_type", ["bloom", "gptj"])
def test_beams_of_a_padded_row_are_those_of_the_row_alone(model_type: str) -> None:
    model = prepared(tiny_model("causal", model_type))
    inputs = inputs_of(model, "left")
    search = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(**inputs, **search)
    alone = model.generate(inputs["input_ids"][1:, 3:], **search)
    assert torch.equal(tokens[1:, 3:], alone)


def test_an_encoder_decoder_generates() -> None:
    base = tiny_model("seq2seq", "mvp")
    model = prepared(base)
    inputs = {name: x for name, x in inputs_of(base, "right").items() if not name.startswith("decoder")}
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        scores = from_own_cache(base, model, inputs | {"decoder_input_ids": tokens})
    chosen = scores[:, 1:-1].gather(-1, tokens[:, 2:, None])[..., 0]
    torch.testing.assert_close(chosen, scores[:, 1:-1].amax(-1))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "mvp"])
def test_a_decoder_beside_an_encoder_of_its_own_attends_to_both(model_type: str, use_cache: bool) -> None:
    settings = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "add_cross_attention": True}
    config = transformers.GPT2Config(**settings)
    base = transformers.GPT2LMHeadModel(config).eval() if model_type == "gpt2" else tiny_model("causal", "mvp")
    model = prepared(base)
    inputs = inputs_of(base, "none")
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    layout = model._prefix_state.tasks.layout
    own = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for number, (key, value) in layout.pairs(model.prefix_encoder, layout.stacks[0]).items():
        own.self_attention_cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), number)
    mask = torch.ones(2, 13, dtype=torch.int64)
    expected = base(inputs["input_ids"], attention_mask=mask, past_key_values=own, encoder_hidden_states=states).logits
    check_equal(model, model(**inputs, encoder_hidden_states=states, use_cache=use_cache).logits, expected, inputs)


def test_a_callers_cache_holds_the_sequence_alone() -> None:
    base = tiny_model("causal", "gptj")
    model = prepared(base)
    inputs = inputs_of(base, "none")
    whole = model(**inputs).logits
    cache = DynamicCache()
    first = model(input_ids=inputs["input_ids"][:, :5], past_key_values=cache)
    assert first.past_key_values is cache
    assert cache.get_seq_length() == 5
    second = model(input_ids=inputs["input_ids"][:, 5:], past_key_values=cache, return_dict=False)
    assert any(x is cache for x in second)
    torch.testing.assert_close(torch.cat([first.logits, second[0]], dim=1), whole, rtol=0, atol=1e-5)
    assert model(**inputs, use_cache=False).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "megatron-bert", "mpt"])
def test_a_tuple_holds_no_cache_where_none_is_wanted(model_type: str) -> None:
    base = tiny_model("causal", model_type)
    model = prepared(base)
    inputs = inputs_of(base, "none")
    for wanted in ({}, {"use_cache": False}, {"use_cache": True}):
        ours, theirs = (m(**inputs, **wanted, return_dict=False) for m in (model, base))
        assert [type(x) for x in ours] == [type(x) for x in theirs]


@torch.no_grad()
def test_a_model_of_both_sides_sees_what_its_callers_cache_holds() -> None:
    model = prepared(tiny_model("causal", "megatron-bert"))
    ids, cache = inputs_of(model, "none")["input_ids"], DynamicCache()
    model(input_ids=ids[:, :5], past_key_values=cache)
    other = copy.deepcopy(cache)
    logits = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    masked = model(input_ids=ids[:, 5:], past_key_values=other, attention_mask=torch.ones(2, 9)).logits
    torch.testing.assert_close(logits, masked)


@pytest.mark.parametrize("model_type", ["gpt2", "mvp"])
def test_a_plain_cache_serves_beside_an_encoder(model_type: str) -> None:
    settings = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "add_cross_attention": True}
    config = transformers.GPT2Config(**settings)
    model = prepared(
        transformers.GPT2LMHeadModel(config).eval() if model_type == "gpt2" else tiny_model("causal", "mvp")
    )
    ids = inputs_of(model, "none")["input_ids"]
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=ids, encoder_hidden_states=states).logits
    cache = DynamicCache()
    first = model(input_ids=ids[:, :5], encoder_hidden_states=states, past_key_values=cache)
    assert cache.get_seq_length() == 5
    returned = first.past_key_values
    second = model(input_ids=ids[:, 5:7], encoder_hidden_states=states, past_key_values=returned)
    third = model(input_ids=ids[:, 7:], encoder_hidden_states=states, past_key_values=cache)
    logits = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
