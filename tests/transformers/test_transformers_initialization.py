"""Prefixes that begin as a text, as another prefix, or as noise of the scale of the model's own keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import P, bart_with_large_weights, batch, prepared, t5_with_a_deep_decoder, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_kernels.integrations.transformers import (
    initialize_from_prefix,
    initialize_from_text,
    initialize_like_keys,
    load_named_prefix,
    save_prefix_model,
    set_prefix,
)


def tiny_decoder(family: str) -> PreTrainedModel:
    heads = {"num_key_value_heads": 2, "head_dim": 8} if family == "qwen3" else {}
    return tiny_model(family, AutoModelForCausalLM, **heads)


@pytest.mark.parametrize("attention", ["prefix_kernels", "torch"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox", "qwen3"])
def test_a_decoder_whose_prefix_is_the_beginning_of_a_text_goes_on_as_if_it_had_read_it(
    family: str, attention: str
) -> None:
    base = tiny_decoder(family)
    text = torch.randint(3, 97, (12,))
    model = prepared(base, attention=attention).train()
    initialize_from_text(model, text[:P])
    assert model.training and model.prefix_encoder.table.requires_grad
    expected = base(text[None]).logits[:, P:]
    torch.testing.assert_close(model.eval()(text[None, P:]).logits, expected, rtol=1e-5, atol=1e-4)
    initialize_from_text(model, text[None])
    torch.testing.assert_close(model(text[None, P:]).logits, expected, rtol=1e-5, atol=1e-4)


class Tokenizer:
    def __call__(self, text: str, return_tensors: str) -> dict[str, Tensor]:
        assert return_tensors == "pt"
        return {"input_ids": torch.tensor([[ord(c) % 90 + 3 for c in text]])}


def test_a_string_is_read_through_the_tokenizer() -> None:
    by_string, by_ids = (prepared(tiny_decoder("llama")) for _ in range(2))
    by_ids.load_state_dict(by_string.state_dict())
    initialize_from_text(by_string, "a prefix", Tokenizer())
    initialize_from_text(by_ids, Tokenizer()("a prefix", "pt")["input_ids"])
    assert torch.equal(by_string.prefix_encoder.table, by_ids.prefix_encoder.table)
    with pytest.raises(TypeError, match="tokenizer: expected one that makes token ids of the text, got None"):
        initialize_from_text(by_ids, "a prefix")


def test_the_last_tokens_are_taken_as_the_whole_text_made_them() -> None:
    base = tiny_decoder("llama")
    text = torch.randint(3, 97, (12,))
    model = prepared(base, num_virtual_tokens=4)
    initialize_from_text(model, text, tokens="last")
    whole = prepared(base, num_virtual_tokens=12)
    initialize_from_text(whole, text)
    torch.testing.assert_close(model.prefix_encoder.table, whole.prefix_encoder.table[8:])


def test_a_text_that_is_too_short_is_refused_or_repeated() -> None:
    model, text = prepared(tiny_decoder("gpt2")), torch.randint(3, 97, (3,))
    before = model.prefix_encoder.table.clone()
    with pytest.raises(ValueError, match="text: expected at least 5 tokens, the length of the prefix, got 3; repeat=T"):
        initialize_from_text(model, text)
    assert torch.equal(model.prefix_encoder.table, before)
    initialize_from_text(model, text, repeat=True)
    table = model.prefix_encoder.table
    assert torch.equal(table[3:], table[:2]) and not torch.equal(table[0], table[1])


def test_the_prefix_at_hand_does_not_influence_what_the_text_gives() -> None:
    model, text = prepared(tiny_model("bert")), torch.randint(3, 97, (7,))
    initialize_from_text(model, text)
    first = model.prefix_encoder.table.clone()
    initialize_from_text(model, text)
    assert torch.equal(model.prefix_encoder.table, first)


def test_every_attention_of_an_encoder_decoder_takes_the_text_that_it_reads() -> None:
    base = t5_with_a_deep_decoder()
    model = prepared(base, num_virtual_tokens=4)
    source, target = torch.randint(3, 97, (6,)), torch.randint(3, 97, (1, 5))
    initialize_from_text(model, source, decoder_input_ids=target)
    hidden = base.encoder(source[None]).last_hidden_state
    cross = base.decoder.block[1].layer[1].EncDecAttention
    key = cross.k(hidden).view(6, 4, 8)[:4]
    torch.testing.assert_close(model.prefix_encoder["cross"].table[:, 2], key, rtol=1e-5, atol=1e-5)


def test_an_encoder_decoder_whose_prefix_is_the_beginning_of_the_answer_goes_on_as_if_it_had_given_it() -> None:
    base = bart_with_large_weights()
    model = prepared(base, target_attentions=["decoder"])
    source, target = torch.randint(3, 97, (1, 6)), torch.randint(3, 97, (1, 9))
    initialize_from_text(model, source, decoder_input_ids=target)
    expected = base(input_ids=source, decoder_input_ids=target).logits[:, P:]
    logits = model(input_ids=source, decoder_input_ids=target[:, P:]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_a_subset_of_layers_of_several_lengths_is_initialised() -> None:
    base, text = tiny_decoder("llama"), torch.randint(3, 97, (9,))
    whole = prepared(base, num_virtual_tokens=9)
    initialize_from_text(whole, text)
    model = prepared(base, num_virtual_tokens=[2, 6], position_offset="none")
    initialize_from_text(model, text)
    torch.testing.assert_close(model.prefix_encoder["self_1"].table, whole.prefix_encoder.table[:6, 2:])
    model = prepared(base, num_virtual_tokens=6, layers=[1])
    initialize_from_text(model, text)
    torch.testing.assert_close(model.prefix_encoder.table, whole.prefix_encoder.table[:6, 2:])


@pytest.mark.parametrize("length", [3, 5, 8])
@pytest.mark.parametrize("source", ["file", "projection", "model"])
def test_another_prefix_is_cut_or_repeated(source: str, length: int, tmp_path: Path) -> None:
    base = tiny_model("bert")
    other = prepared(base, prefix_projection=source == "projection", prefix_dropout=0.5).train()
    if source != "model":
        save_prefix_model(other, tmp_path / "other", fold=False)
    model = prepared(base, num_virtual_tokens=length)
    initialize_from_prefix(model, other if source == "model" else tmp_path / "other")
    table = other.prefix_encoder.folded_prefix_state()["table"]
    expected = torch.cat([table, table])[:length]
    torch.testing.assert_close(model.prefix_encoder.table.detach(), expected)
    assert other.prefix_encoder.training


def test_prefixes_of_all_layers_serve_a_model_with_a_prefix_in_one() -> None:
    base = tiny_decoder("llama")
    other, model = prepared(base), prepared(base, num_virtual_tokens=7, layers=[1])
    initialize_from_prefix(model, other)
    assert torch.equal(model.prefix_encoder.table[:5], other.prefix_encoder.table[:, 2:])
    with pytest.raises(ValueError, match="source: expected a prefix at every attention of the model's, got none at s"):
        initialize_from_prefix(other, model)


def test_noise_has_the_statistics_of_the_keys_of_the_sample() -> None:
    base = tiny_model("bert")
    model = prepared(base, num_virtual_tokens=4000)
    inputs = batch("bert", "right")
    initialize_like_keys(model, **inputs)
    layer = base.bert.encoder.layer[0].attention.self
    hidden = base.bert.embeddings(inputs["input_ids"])[inputs["attention_mask"].bool()]
    table = model.prefix_encoder.table
    for number, projection in enumerate([layer.key, layer.value]):
        states = projection(hidden)
        drawn = table[:, number].flatten(1)
        assert ((drawn.mean(0) - states.mean(0)).abs() < 0.1 * states.std(0)).all()
        torch.testing.assert_close(drawn.std(0), states.std(0), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"input_ids": torch.tensor([[5]])},
            "input_ids: expected at least two tokens that are not padding, got 1: the st",
        ),
        ({"inputs_embeds": torch.ones(1, 1, 32)}, "inputs_embeds: expected at least two tokens .*, got 1"),
        (
            {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.zeros(2, 4, dtype=torch.long)},
            "attention_mask: expected at least two tokens that are not padding, got 0",
        ),
        (
            {"input_ids": torch.full((1, 4), 5), "attention_mask": torch.tensor([[0, 0, 1, 0]])},
            "attention_mask: expected at least two tokens that are not padding, got 1",
        ),
    ],
    ids=["one token", "one embedding", "all padding", "all padding but one"],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_sample_without_a_standard_deviation_is_refused(family: str, inputs: dict[str, Tensor], message: str) -> None:
    model = prepared(tiny_model("bert") if family == "bert" else tiny_decoder(family))
    before = model.prefix_encoder.table.clone()
    with pytest.raises(ValueError, match=message):
        initialize_like_keys(model, **inputs)
    assert torch.equal(model.prefix_encoder.table, before)
    two = torch.tensor([[5, 6]])
    initialize_like_keys(model, input_ids=two)
    assert model.prefix_encoder.table.isfinite().all() and not torch.equal(model.prefix_encoder.table, before)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"decoder_input_ids": torch.tensor([[5]])}, "decoder_input_ids: expected at least two tokens .*, got 1"),
        (
            {
                "decoder_input_ids": torch.tensor([[5, 6, 7]]),
                "decoder_attention_mask": torch.zeros(1, 3, dtype=torch.long),
            },
            "decoder_attention_mask: expected at least two tokens .*, got 0",
        ),
    ],
)
def test_a_sample_of_an_encoder_decoder_is_refused_by_the_name_of_its_side(
    decoder: dict[str, Tensor], message: str
) -> None:
    model = prepared(t5_with_a_deep_decoder(), target_attentions=["encoder", "decoder", "cross"])
    before = [table.clone() for table in model.prefix_encoder.parameters()]
    with pytest.raises(ValueError, match=message):
        initialize_like_keys(model, input_ids=torch.full((1, 4), 5), **decoder)
    assert all(torch.equal(a, b) for a, b in zip(before, model.prefix_encoder.parameters(), strict=True))
    with pytest.raises(ValueError, match="^input_ids: expected at least two tokens"):
        initialize_like_keys(model, input_ids=torch.tensor([[5]]), decoder_input_ids=torch.tensor([[5, 6]]))


def test_the_padding_of_a_text_hides_nothing_of_an_image() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 99, "max_position_embeddings": 8},
        vision_config=sizes | {"image_size": 4, "patch_size": 2},
    )
    model = prepared(transformers.CLIPModel(config).eval(), num_virtual_tokens=4000)
    # As many tokens as there are patches and the class token, so that the mask would fit.
    text, mask = torch.randint(3, 97, (1, 5)), torch.tensor([[1, 1, 0, 0, 0]])
    tables = []
    for attention_mask in (mask, torch.ones_like(mask)):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
        initialize_like_keys(
            model, generator=generator, input_ids=text, attention_mask=attention_mask, pixel_values=pixels
        )
        tables.append({name: one.table.clone() for name, one in model.prefix_encoder.items()})
    assert torch.equal(tables[0]["vision"], tables[1]["vision"])
    assert not torch.equal(tables[0]["text"], tables[1]["text"])
    with pytest.raises(ValueError, match="^input_ids: expected at least two tokens"):
        initialize_like_keys(model, input_ids=text[:, :1], pixel_values=pixels)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_prefix_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    base, text = tiny_decoder("llama"), torch.randint(3, 97, (9,))
    broken, healthy = prepared(base), prepared(base)
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = value
        healthy.prefix_encoder.table[-1, -1, -1, -1] = value
    before = broken.prefix_encoder.table.clone()
    save_prefix_model(healthy, tmp_path / "task")
    for message, write in (
        ("text", lambda: initialize_from_text(broken, text)),
        ("inputs", lambda: initialize_like_keys(broken, input_ids=text[None])),
        ("source", lambda: initialize_from_prefix(broken, healthy)),
        ("source", lambda: initialize_from_prefix(broken, tmp_path / "task")),
    ):
        expected = f"^{message}: expected finite keys and values at every attention, got NaN or infinity at self 1"
        with pytest.raises(ValueError, match=expected):
            write()
        assert torch.equal(broken.prefix_encoder.table, before)


def test_what_a_half_precision_prefix_cannot_hold_is_refused() -> None:
    base = tiny_decoder("llama")
    model, source = prepared(base), prepared(base)
    model.prefix_encoder.half()
    with torch.no_grad():
        source.prefix_encoder.table[0, 0] = 1e6
    with pytest.raises(ValueError, match="source: expected finite keys and values .* at self 0"):
        initialize_from_prefix(model, source)
    assert model.prefix_encoder.table.isfinite().all()


def test_an_empty_text_is_refused() -> None:
    for repeat in (False, True):
        with pytest.raises(ValueError, match="text: expected at least one token, got none"):
            initialize_from_text(prepared(tiny_decoder("llama")), torch.empty(0, dtype=torch.long), repeat=repeat)


def test_a_named_task_is_initialised_when_it_is_active(tmp_path: Path) -> None:
    base, text = tiny_decoder("llama"), torch.randint(3, 97, (9,))
    model = prepared(base)
    save_prefix_model(model, tmp_path / "task")
    load_named_prefix(model, "task", tmp_path / "task")
    before = model.prefix_encoder.table.clone()
    inputs = batch("llama")
    model(**inputs, prefix_names=["task", None, None])
    set_prefix(model, "task")
    initialize_from_text(model, text)
    mixed = model(**inputs, prefix_names=["task", None, None]).logits[:1]
    torch.testing.assert_close(mixed, model(**inputs).logits[:1], rtol=1e-5, atol=1e-5)
    set_prefix(model, "default")
    assert torch.equal(model.prefix_encoder.table, before)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (
            {},
            {"text": torch.ones(2, 7, dtype=torch.int64)},
            r"text: expected token ids \[T\] or \[1, T\], got \[2, 7\]",
        ),
        ({}, {"text": torch.ones(7, dtype=torch.long), "tokens": "all"}, "tokens: expected 'first' or 'last'"),
        (
            {"prefix_projection": True},
            {"text": torch.ones(7, dtype=torch.long)},
            "expected a prefix that is a table, got one that a projection generates",
        ),
    ],
)
def test_what_cannot_be_initialised_is_refused(
    settings: dict[str, object], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        initialize_from_text(prepared(tiny_decoder("llama"), **settings), **arguments)


def test_a_prefix_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_prefix_model(prepared(tiny_model("bert")), tmp_path / "task")
    model = prepared(tiny_decoder("llama"))
    with pytest.raises(ValueError, match=r"expected a prefix that fits LlamaForCausalLM, got another"):
        initialize_from_prefix(model, tmp_path / "task")
    with pytest.raises(ValueError, match=r"source: expected a prefix \[5, 4, 2, 8\], got \[5, 4, 4, 8\]"):
        initialize_from_prefix(model, prepared(tiny_model("bert")))
