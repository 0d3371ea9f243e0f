"""Decoders of text with a prefix: tiny random models of every family."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from decoder_families import FAMILIES, FIRST_TOKEN, LENGTH, MIXED_FAMILIES, SLIDING, VOCABULARY, WINDOW, batch
from family_checks import (
    Family,
    P,
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
from transformers import AutoConfig, DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from prefix_kernels.integrations.transformers import load_named_prefix, load_prefix_model, save_prefix_model
from prefix_kernels.integrations.transformers.attention.interface import prefix_attention
from prefix_kernels.integrations.transformers.attention.masks import prefix_mask


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


windows = pytest.mark.parametrize("window_includes_prefix", [False, True], ids=["always visible", "slides"])


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@windows
@paddings
@of_each(SLIDING)
def test_the_torch_baseline_slides_alike(family: Family, padding: str, window_includes_prefix: bool) -> None:
    base = family.model()
    ours = prepared(family, base, window_includes_prefix=window_includes_prefix)
    baseline = prepared(family, base, window_includes_prefix=window_includes_prefix, attention="torch")
    baseline.load_state_dict(ours.state_dict())
    inputs = family.inputs(padding)
    outputs = [model(**inputs, labels=family.labels(inputs)) for model in (ours, baseline)]
    for output in outputs:
        output.loss.backward()
    valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(outputs[0].logits[valid], outputs[1].logits[valid], rtol=0, atol=1e-5)
    torch.testing.assert_close(tables(ours)[0].grad, tables(baseline)[0].grad, rtol=0, atol=1e-5)


@windows
def test_the_torch_baseline_generates_alike(window_includes_prefix: bool) -> None:
    check_generation(named("mistral"), window_includes_prefix=window_includes_prefix, attention="torch")


@windows
@of_each(SLIDING)
def test_whether_the_prefix_slides_out_of_sight_is_chosen(family: Family, window_includes_prefix: bool) -> None:
    """Every layer slides, and the last token stands P + WINDOW behind the first of the prefix."""
    model = family.model(layer_types=["sliding_attention"] * 2)
    model = prepared(family, model, window_includes_prefix=window_includes_prefix, position_offset="none")
    input_ids = batch("none")["input_ids"]
    before = model(input_ids).logits
    with torch.no_grad():
        tables(model)[0].normal_()
    after = model(input_ids).logits
    # Through two layers the prefix reaches 2 * (WINDOW - 1) positions.
    reached = 2 * (WINDOW - 1)
    assert not torch.allclose(before[:, :reached], after[:, :reached])
    assert torch.allclose(before[:, reached:], after[:, reached:]) == window_includes_prefix


@pytest.mark.parametrize("padding", ["none", "left"])
@of_each(SLIDING)
def test_generated_tokens_are_those_of_peft_where_the_prefix_slides(family: Family, padding: str) -> None:
    base = family.model()
    ours = prepared(family, base, window_includes_prefix=True)
    theirs = with_peft(family, base, ours)
    settings = batch(padding) | {"max_new_tokens": 8, "do_sample": False}
    expected = theirs.generate(**settings)
    assert len(expected[:, LENGTH:].unique()) > 3, "a model that repeats one token would hide mistakes"
    assert torch.equal(ours.generate(**settings), expected)


def in_pieces(model: PreTrainedModel, input_ids: Tensor, pieces: list[int], static: bool, **more: object) -> Tensor:
    """The logits of a prompt that is fed to a cache piece by piece."""
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    outputs = [model(piece, past_key_values=cache, **more).logits for piece in input_ids.split(pieces, dim=1)]
    return torch.cat(outputs, dim=1)


# Shorter and longer than the window, before and after the cache has begun to drop keys.
PIECES = ([2, 1, 3, 1, 7], [6, 8], [1, 4, 9])
caches = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


@windows
@caches
@of_each(SLIDING)
def test_a_prompt_fed_in_pieces_gives_the_same_logits(
    family: Family, static: bool, window_includes_prefix: bool
) -> None:
    input_ids = torch.randint(FIRST_TOKEN, VOCABULARY, (2, 14))
    base = family.model()
    for attention in ("prefix_kernels", "torch") if family.name == "mistral" else ("prefix_kernels",):
        model = prepared(family, base, window_includes_prefix=window_includes_prefix, attention=attention)
        whole = model(input_ids, use_cache=False).logits
        for pieces in PIECES:
            logits = in_pieces(model, input_ids, pieces, static)
            torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


@windows
@caches
@pytest.mark.parametrize("attention", ["prefix_kernels", "torch"])
def test_in_a_mixed_batch_the_prefix_of_each_row_slides_by_its_own_length(
    attention: str, static: bool, window_includes_prefix: bool, tmp_path: Path
) -> None:
    family = named("mistral")
    base = family.model()
    settings = {"window_includes_prefix": window_includes_prefix, "attention": attention}
    alone = {length: prepared(family, base, num_virtual_tokens=length, **settings) for length in (1, 2, P)}
    for length, model in alone.items():
        save_prefix_model(model, tmp_path / f"{length}.safetensors")
    mixed = load_prefix_model(copy.deepcopy(base), tmp_path / f"{P}.safetensors")
    for length in (1, 2):
        load_named_prefix(mixed, str(length), tmp_path / f"{length}.safetensors")

    input_ids = torch.randint(FIRST_TOKEN, VOCABULARY, (4, 14))
    names = ["2", "default", None, "1"]
    models = [alone[2], alone[P], base, alone[1]]
    expected = torch.cat([model(row[None]).logits for model, row in zip(models, input_ids, strict=True)])
    for pieces in ([14], *PIECES):
        logits = in_pieces(mixed, input_ids, pieces, static, prefix_names=names)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@windows
@of_each(SLIDING)
def test_no_mask_of_size_sq_times_sk_is_built(
    family: Family, window_includes_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(query: Tensor, key: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        seen.append((query.shape[2], kwargs["attn_mask"], kwargs["window_size"]))
        return prefix_attention(query, key, *args, **kwargs)

    monkeypatch.setattr("prefix_kernels.integrations.transformers.attention.interface.prefix_attention", spy)
    model = prepared(family, family.model(), window_includes_prefix=window_includes_prefix)
    for padding in ("none", "right", "left"):
        model(**batch(padding))
    for cache in ("dynamic", "static"):
        model.generate(**batch("left"), max_new_tokens=6, cache_implementation=cache, disable_compile=True)
    assert len(seen) == 2 * (3 + 2 * 6)
    for queries, mask, _ in seen:
        assert mask is None or mask.shape[1:3] == (1, 1)
        assert queries == LENGTH or queries == 1
    assert (WINDOW - 1, 0) in [window for queries, _, window in seen if queries == LENGTH]


def test_layers_without_a_prefix_take_any_mask_where_the_prefix_slides() -> None:
    """Of layers that slide and layers that do not, only the latter have one."""
    family = named("qwen2")
    model = prepared(family, family.model(), window_includes_prefix=True, layers=[1])
    input_ids = batch("none")["input_ids"]
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    causal, window = columns <= rows, (columns <= rows) & (columns > rows - WINDOW)
    masks = {"full_attention": causal[None, None], "sliding_attention": window[None, None]}
    torch.testing.assert_close(model(input_ids, attention_mask=masks).logits, model(input_ids).logits)


@of_each([named("mistral"), named("gemma3_text")])
def test_a_mask_of_four_dimensions_where_the_prefix_slides_is_refused(family: Family) -> None:
    model = prepared(family, family.model(), window_includes_prefix=True)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    with pytest.raises(NotImplementedError, match="window_includes_prefix=True: a mask of four dimensions"):
        model(batch("none")["input_ids"], attention_mask=mask)


@windows
def test_a_compiled_model_takes_its_own_positions_for_those_of_one_sequence(window_includes_prefix: bool) -> None:
    """Else it would mask Sq x Sk for sequences packed in a row, which are refused where the prefix slides."""
    settings = {"window_includes_prefix": window_includes_prefix, "position_offset": "none"}
    model = prepared(named("mistral"), named("mistral").model(num_hidden_layers=1), **settings)
    input_ids = batch("none")["input_ids"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, model(input_ids).logits)


@windows
def test_a_static_cache_is_decoded_by_one_graph(window_includes_prefix: bool) -> None:
    model = prepared(named("gemma3_text"), named("gemma3_text").model(), window_includes_prefix=window_includes_prefix)
    settings = batch("left") | {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**settings)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    compiled = model.generate(**settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(compiled, expected)
    assert len(graphs) == 2, "the prompt and the decoding step"


@paddings
def test_decoders_made_bidirectional_keep_their_windows(padding: str) -> None:
    """Each of the two families by its own switch; their windows differ by one."""
    gemma = dataclasses.replace(
        named("gemma3_text"), model=functools.partial(named("gemma3_text").model, use_bidirectional_attention=True)
    )
    mistral = dataclasses.replace(named("mistral"), model=functools.partial(named("mistral").model, is_causal=False))
    for family in (gemma, mistral):
        check_against_eager(family, padding)


def test_only_a_plain_window_is_taken_for_one() -> None:
    """Masks that more is laid over, and local attention in chunks, are given as they are."""
    overlaid = and_masks(sliding_window_causal_mask_function(WINDOW), lambda batch, head, q, kv: kv != 1)
    chunked = chunked_causal_mask_function(WINDOW, torch.zeros(1, dtype=torch.int64))
    llama4 = AutoConfig.for_model("llama4_text", attention_chunk_size=WINDOW)
    sizes = {"batch_size": 1, "q_length": LENGTH, "kv_length": LENGTH, "local_size": WINDOW}
    for function, more in ((overlaid, {"allow_is_causal_skip": False}), (chunked, {"config": llama4})):
        mask = prefix_mask(mask_function=function, **sizes, **more)
        rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        expected = function(0, 0, rows, columns)
        assert torch.equal(mask, expected[None, None])
    assert prefix_mask(mask_function=sliding_window_causal_mask_function(WINDOW), **sizes) is None
    assert prefix_mask(mask_function=causal_mask_function, **sizes) is None


def test_positions_of_opt_count_tokens_and_end_with_its_table() -> None:
    family = named("opt")
    model = prepared(family, family.model(max_position_embeddings=LENGTH + P))
    inputs = batch("left")
    logits = model(**inputs).logits
    mask = inputs["attention_mask"]
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    given = model(**inputs, position_ids=counted).logits
    torch.testing.assert_close(given[mask.bool()], logits[mask.bool()])
    longer = torch.randint(FIRST_TOKEN, VOCABULARY, (1, LENGTH + 1))
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens do not fit.*leaves {LENGTH}.*position_offset='none'"):
        model(longer)


@paddings
def test_logits_of_opt_at_padding_are_those_of_peft_and_of_a_cache_that_holds_the_prefix(padding: str) -> None:
    """Padding keeps the position -1, which OPT gives to it alone, however late the sequence begins."""
    family = named("opt")
    base = family.model()
    ours = prepared(family, base)
    theirs = with_peft(family, base, ours)
    inputs = batch(padding)
    logits = ours(**inputs).logits
    torch.testing.assert_close(logits, theirs(**inputs).logits, rtol=0, atol=1e-5)
    cache = DynamicCache(config=base.config)
    for layer in range(2):
        key, value = (tables(ours)[0][:, 2 * layer + i].transpose(0, 1).expand(3, -1, -1, -1) for i in range(2))
        cache.update(key, value, layer)
    mask = torch.cat(
        [torch.ones(3, P, dtype=torch.long), inputs.get("attention_mask", torch.ones(3, LENGTH).long())], 1
    )
    cached = base(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits, cached, rtol=0, atol=1e-5)
    if padding != "none":
        # As a caller who counts like the model gives them.
        positions = mask[:, P:].cumsum(1) * mask[:, P:] - 1
        torch.testing.assert_close(ours(**inputs, position_ids=positions).logits, logits, rtol=0, atol=1e-5)


@paddings
def test_rows_of_opt_without_a_prefix_keep_their_positions_at_padding(padding: str) -> None:
    family = named("opt")
    base = family.model()
    model = prepared(family, base)
    inputs = batch(padding)
    alone = model(**inputs).logits
    mixed = model(**inputs, prefix_names=["default", None, "default"]).logits
    plain = base(**inputs).logits
    torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]], rtol=0, atol=1e-5)
    valid = inputs.get("attention_mask", torch.ones(3, LENGTH))[1].bool()
    torch.testing.assert_close(mixed[1][valid], plain[1][valid], rtol=0, atol=1e-5)
