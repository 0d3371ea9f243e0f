"""The Transformers integration on encoder-decoder models: T5 (also gated, as in flan-T5), BART, mBART and Whisper."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from encoder_decoder_families import (
    BART,
    DECODER_LAYERS,
    ENCODER_LAYERS,
    END,
    FAMILIES_AND_PADDINGS,
    MBART,
    SOURCE,
    T5,
    TALKATIVE,
    TARGET,
    VOCABULARY,
    WHISPER,
    each_family,
    speech,
    text,
    tiny_bart,
    tiny_mbart,
    tiny_t5,
    tiny_whisper,
    with_depths,
    with_model,
)
from family_checks import (
    Family,
    P,
    check_activation_checkpointing,
    check_against_eager,
    check_against_peft,
    check_bfloat16,
    check_compiled,
    check_generation,
    check_torch_baseline,
    check_training,
    prepared,
    tables,
    trainable,
    with_peft,
)
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.compatibility.model_types import tiny_model
from prefix_kernels import prefix_attention
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_prefix_model,
    prefix_layers,
    remove_prefix,
    save_prefix_model,
)
from prefix_kernels.integrations.transformers.runtime.relative_bias import StackBias


@pytest.mark.parametrize(
    ("family", "padding"), [case for case in FAMILIES_AND_PADDINGS if case.values[0].peft_task is not None]
)
def test_logits_and_prefix_gradients_are_those_of_peft(family: Family, padding: str) -> None:
    check_against_peft(family, padding, target_attentions=["decoder"])


@pytest.mark.parametrize("family", [T5, BART], ids=lambda family: family.name)
def test_layers_that_share_a_slice_in_peft_are_those_of_peft(family: Family) -> None:
    """With an encoder of even depth; all decoder layers read different ones if it is odd."""
    check_against_peft(with_depths(family, 2, 2), "right", target_attentions=["decoder"])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [T5, BART, MBART], ids=lambda family: family.name)
def test_generated_tokens_are_those_of_peft(family: Family, beams: int) -> None:
    base = family.model(**TALKATIVE[family.name])
    ours = prepared(family, base, target_attentions=["decoder"])
    theirs = with_peft(family, base, ours)
    inputs = {name: tensor for name, tensor in family.inputs("left").items() if not name.startswith("decoder")}
    settings = inputs | {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    expected = theirs.generate(**settings)
    assert len(expected.unique()) > 3, "a model that repeats one token would hide mistakes"
    assert torch.equal(ours.generate(**settings), expected)


@pytest.mark.parametrize(("family", "padding"), FAMILIES_AND_PADDINGS)
def test_logits_and_prefix_gradients_are_those_of_the_eager_model(family: Family, padding: str) -> None:
    check_against_eager(family, padding)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_attentions": ["encoder"]},
        {"target_attentions": ["decoder"]},
        {"target_attentions": ["cross"]},
        {"target_attentions": ["cross", "encoder"], "layers": [1]},
        {"layers": {"encoder": [0, 2], "decoder": [1], "cross": [0, 1]}},
        {"num_virtual_tokens": {"encoder": 2, "decoder": [3, 1], "cross": 4}},
    ],
    ids=["encoder", "decoder", "cross", "one-layer", "layers", "lengths"],
)
@pytest.mark.parametrize("family", [T5, BART, WHISPER], ids=lambda family: family.name)
def test_each_kind_of_attention_can_have_a_prefix_of_its_own(family: Family, settings: dict[str, object]) -> None:
    check_against_eager(family, "right", **settings)


def test_prefixes_are_found_by_kind() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in trainable(prepared(BART, tiny_bart())).items()}
    assert shapes == {
        "prefix_encoder.encoder.table": (P, 2 * ENCODER_LAYERS, 4, 8),
        "prefix_encoder.decoder.table": (P, 2 * DECODER_LAYERS, 4, 8),
        "prefix_encoder.cross.table": (P, 2 * DECODER_LAYERS, 4, 8),
    }
    assert set(trainable(prepared(BART, tiny_bart(), target_attentions=["cross"]))) == {"prefix_encoder.table"}
    with pytest.raises(ValueError, match=r"layers: expected numbers below 2 \(decoder attention\), got 2"):
        prepared(BART, tiny_bart(), layers=[2])
    with pytest.raises(
        ValueError, match=r"layers: expected a value for 'cross', got values for \['decoder', 'encoder'\]"
    ):
        prepared(BART, tiny_bart(), layers={"encoder": [2], "decoder": [0]})
    with pytest.raises(ValueError, match="layers: expected at least one, got none"):
        PrefixTuningConfig(layers={"encoder": []})


@pytest.mark.parametrize("position_offset", ["peft", "none"])
@pytest.mark.parametrize(("family", "padding"), FAMILIES_AND_PADDINGS)
def test_the_torch_baseline_is_the_same_model(family: Family, padding: str, position_offset: str) -> None:
    check_torch_baseline(dataclasses.replace(family, settings={"position_offset": position_offset}), padding)


@each_family
def test_training_moves_the_prefix_and_nothing_frozen(family: Family) -> None:
    check_training(family)


@pytest.mark.parametrize("projection", [False, True], ids=["table", "projection"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@each_family
def test_activation_checkpointing_gives_the_same_gradients(
    family: Family, use_reentrant: bool, projection: bool
) -> None:
    check_activation_checkpointing(family, use_reentrant, projection)


@each_family
def test_generated_tokens_are_those_of_full_recomputation(family: Family) -> None:
    check_generation(with_model(family, **TALKATIVE[family.name]))


@each_family
def test_a_compiled_model_is_one_graph_with_the_same_results(family: Family) -> None:
    check_compiled(with_depths(family, 2, 1), "right")


@each_family
def test_a_bfloat16_model_takes_a_float32_prefix(family: Family) -> None:
    check_bfloat16(family)


class Calls(list):
    """What the operator was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prefix_kernels.integrations.transformers.attention.interface.prefix_attention", self.spy)

    def spy(self, *args: Tensor, **kwargs: object) -> Tensor:
        self.append(kwargs)
        return prefix_attention(*args, **kwargs)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("position_offset", ["peft", "none"])
def test_the_position_bias_of_t5_is_one_mask_for_all_layers(
    monkeypatch: pytest.MonkeyPatch, position_offset: str, padding: str
) -> None:
    model = prepared(T5, tiny_t5(), position_offset=position_offset)
    inputs = text(padding)
    calls = Calls(monkeypatch)
    model(**inputs)
    masks = [call["attn_mask"] for call in calls]
    encoder, decoder, cross = masks[:ENCODER_LAYERS], masks[ENCODER_LAYERS::2], masks[ENCODER_LAYERS + 1 :: 2]

    visible = inputs["attention_mask"].bool()[:, None, None] if padding == "left" else None
    for mask in cross:
        assert mask is None if visible is None else torch.equal(mask, visible)
    for stack, masks, length in ((model.encoder, encoder, SOURCE), (model.decoder, decoder, TARGET)):
        # The prefix as the P positions before the sequence.
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(P + length, P + length)[:, :, P:]
        bias = bias[..., P:] if position_offset == "none" else bias
        if stack is model.encoder and visible is not None:
            bias = bias.masked_fill(~F.pad(visible, (bias.shape[-1] - length, 0), value=True), -torch.inf)
        torch.testing.assert_close(masks[0], bias)
        assert len({mask.data_ptr() for mask in masks}) == 1, "no layer has a copy of its own"
    assert [call["is_causal"] for call in calls] == [False] * ENCODER_LAYERS + [True, False] * DECODER_LAYERS


def test_each_layer_of_umt5_gives_the_prefix_the_bias_of_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model("seq2seq", "umt5")
    model = get_prefix_model(base, PrefixTuningConfig(num_virtual_tokens=P, position_offset="peft"))
    inputs = text("none")
    calls = Calls(monkeypatch)
    model(**inputs)
    masks = [call["attn_mask"] for call in calls if call["attn_mask"] is not None]
    assert len(masks) == 4
    for stack, of_stack, length in ((model.encoder, masks[:2], SOURCE), (model.decoder, masks[2:], TARGET)):
        for block, mask in zip(stack.block, of_stack, strict=True):
            bias = block.layer[0].SelfAttention.compute_bias(P + length, P + length)[:, :, P:]
            torch.testing.assert_close(mask, bias)


def test_another_bias_or_another_padding_gives_another_mask() -> None:
    stack_bias = StackBias(torch.randn(1, 2, 3, 4))
    biases = [torch.randn(1, 2, 3, 3) for _ in range(2)]
    paddings = [torch.tensor([[True, True, last]]) for last in (True, False)]
    for bias in biases:
        for padding in paddings:
            visible = padding[:, None, None]
            for prefix_len in (4, 0):
                mask = stack_bias.mask(bias, padding, visible, 3, prefix_len)
                assert mask.shape == (1, 2, 3, prefix_len + 3)
                torch.testing.assert_close(mask[..., -3:], bias.masked_fill(~visible, -torch.inf))
                assert stack_bias.mask(bias, padding, visible, 3, prefix_len) is mask


@pytest.mark.parametrize("family", [BART, MBART, WHISPER], ids=lambda family: family.name)
def test_no_mask_of_size_sq_times_sk_is_built(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    model = prepared(family, family.model())
    calls = Calls(monkeypatch)
    model(**family.inputs("right"))
    assert len(calls) == ENCODER_LAYERS + 2 * DECODER_LAYERS
    for call in calls:
        assert call["attn_mask"] is None or call["attn_mask"].shape[1:3] == (1, 1)


def test_training_the_table_of_the_position_bias_is_refused() -> None:
    model = prepared(T5, tiny_t5())
    table = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_()
    inputs = text("none")
    with pytest.raises(ValueError, match=r"T5Attention.relative_attention_bias.weight: expected a frozen table"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
    table.requires_grad_(False)
    model(**inputs)


@pytest.mark.parametrize("family", [BART, MBART, WHISPER], ids=lambda family: family.name)
def test_peft_positions_leave_the_decoder_fewer_and_the_encoder_all(family: Family) -> None:
    base = family.model()
    longest = {name: tensor for name, tensor in family.inputs("none").items() if not name.startswith("decoder")}
    if "input_ids" in longest:
        longest["input_ids"] = torch.randint(3, 97, (3, 32))
    decoder_input_ids = torch.randint(3, 97, (3, 32))
    prepared(family, base, position_offset="none")(**longest, decoder_input_ids=decoder_input_ids)
    prepared(family, base, target_attentions=["encoder", "cross"])(**longest, decoder_input_ids=decoder_input_ids)
    shifted = prepared(family, base)
    shifted(**longest, decoder_input_ids=decoder_input_ids[:, : 32 - P])
    with pytest.raises(
        ValueError, match=r"decoder_input_ids: 28 tokens do not fit.*leaves 27 .*position_offset='none'"
    ):
        shifted(**longest, decoder_input_ids=decoder_input_ids[:, : 33 - P])


@pytest.mark.parametrize(
    ("model_class", "tiny", "heads"),
    [
        (transformers.T5Model, tiny_t5, set()),
        (transformers.T5EncoderModel, tiny_t5, set()),
        (transformers.T5ForSequenceClassification, tiny_t5, {"classification_head"}),
        (transformers.T5ForTokenClassification, tiny_t5, {"classifier"}),
        (transformers.T5ForQuestionAnswering, tiny_t5, {"qa_outputs"}),
        (transformers.BartForSequenceClassification, tiny_bart, {"classification_head"}),
        (transformers.MBartForQuestionAnswering, tiny_mbart, {"qa_outputs"}),
        (transformers.WhisperForAudioClassification, tiny_whisper, {"projector", "classifier"}),
    ],
)
def test_every_head_is_trained_beside_every_element_of_the_prefix(
    model_class: type[PreTrainedModel], tiny: Callable[[], PreTrainedModel], heads: set[str]
) -> None:
    model = get_prefix_model(model_class(tiny().config).eval(), PrefixTuningConfig(num_virtual_tokens=P))
    inputs = (speech if tiny is tiny_whisper else text)("none")
    inputs.get("input_ids", torch.empty(1, 1))[:, -1] = END
    if model_class is not transformers.T5Model:
        del inputs["decoder_input_ids"]
    model(**inputs)[0].square().sum().backward()
    assert all(table.grad.ne(0).all() for table in tables(model))
    assert {name.split(".")[0] for name in trainable(model)} == heads | {"prefix_encoder"}


def test_a_task_is_saved_and_loaded(tmp_path: Path) -> None:
    base = tiny_bart()
    model = prepared(
        BART, base, num_virtual_tokens={"encoder": 2, "decoder": [3, 1], "cross": 4}, position_offset="none"
    )
    save_prefix_model(model, tmp_path / "task.safetensors")
    inputs = text("left")
    loaded = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert torch.equal(remove_prefix(loaded)(**inputs).logits, base(**inputs).logits)


def composite() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    bert = transformers.BertConfig(vocab_size=VOCABULARY, **sizes)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, copy.deepcopy(bert))
    return transformers.EncoderDecoderModel(config)


@pytest.mark.parametrize("build", [composite, lambda: tiny_bart("bigbird_pegasus")])
def test_encoder_decoders_whose_encoder_needs_its_own_attention_have_a_prefix_in_their_cache(
    build: Callable[[], PreTrainedModel],
) -> None:
    with pytest.warns(UserWarning, match="the prefix lies in the key/value cache"):
        model = get_prefix_model(build())
    assert len(prefix_layers(model)) == len(model.prefix_encoder.table[0]) // 2
    assert all("decoder" in name for name in prefix_layers(model))
