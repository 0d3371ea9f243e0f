"""Prefixes in the key/value cache, of models whose attention function cannot be replaced (``attention="cache"``)."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from benchmarks.compatibility.family_trial import inputs_of
from benchmarks.compatibility.model_types import tiny_model
from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_named_prefix,
    get_prefix_model,
    initialize_from_text,
    load_named_prefix,
    load_prefix_model,
    prefix_layers,
    remove_prefix,
    save_prefix_model,
    select_prefixes,
    set_prefix,
    use_prefixes,
)
from prefix_kernels.integrations.transformers.structure.cached_attention import layer_index

DECODERS = [
    *(
        "bloom",
        "codegen",
        "doge",
        "falcon",
        "gemma4_text",
        "got_ocr2",
        "gpt_neo",
        "gpt_neox_japanese",
        "gptj",
        "jetmoe",
    ),
    *("mvp", "trocr", "xglm"),
]
BOTH_SIDES = ["megatron-bert", "rembert", "roformer"]
WITH_ENCODER = ["bigbird_pegasus", "encoder-decoder", "led", "longt5", "mvp", "seamless_m4t", "t5gemma2"]
CASES = [
    *(("causal", model_type) for model_type in DECODERS),
    *(("causal", model_type) for model_type in BOTH_SIDES),
    *(("seq2seq", model_type) for model_type in WITH_ENCODER),
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


def prepared(base: PreTrainedModel, length: int = 4, **settings: object) -> PreTrainedModel:
    torch.manual_seed(1)
    defaults = {"num_virtual_tokens": length, "init_std": 0.5, "modules_to_save": (), "window_includes_prefix": True}
    return get_prefix_model(copy.deepcopy(base), PrefixTuningConfig(**defaults | {"attention": "cache"} | settings))


def tables(model: PreTrainedModel) -> list[Tensor]:
    return [parameter for parameter in model.prefix_encoder.parameters() if parameter.requires_grad]


def from_own_cache(base: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor], **more: object) -> Tensor:
    """Logits of the plain ``base``, given a cache that begins with the prefixes of ``model``."""
    layout = model._prefix_state.tasks.layout
    pairs = layout.pairs(model.prefix_encoder, layout.stacks[0])
    batch = inputs["input_ids"].shape[0]
    own = DynamicCache(config=base.config.get_text_config(decoder=True))
    for number, site in enumerate(layout.sites):
        own.update(*(x.expand(batch, -1, -1, -1) for x in pairs[number]), layer_index(site.module))
    if base.config.is_encoder_decoder:
        return base(**inputs, past_key_values=EncoderDecoderCache(own, DynamicCache()), **more).logits
    mask = torch.cat([torch.ones(batch, own.get_seq_length(), dtype=torch.int64), inputs["attention_mask"]], dim=1)
    return base(**inputs | {"attention_mask": mask}, past_key_values=own, **more).logits


def check_equal(model: PreTrainedModel, actual: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    weights = torch.ones(()) if "decoder_input_ids" in inputs else inputs["attention_mask"][..., None].float()
    torch.testing.assert_close(actual * weights, expected * weights, rtol=0, atol=1e-5)
    ours, theirs = (torch.autograd.grad((x * weights).square().sum(), tables(model)) for x in (actual, expected))
    for grad, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-5 * other.abs().max().item())
        assert (grad.abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("kind", "model_type"), CASES)
def test_logits_and_gradients_are_those_of_the_models_own_cache(kind: str, model_type: str, padding: str) -> None:
    base = tiny_model(kind, model_type)
    model = prepared(base)
    inputs = inputs_of(base, padding)
    check_equal(model, model(**inputs).logits, from_own_cache(base, model, inputs), inputs)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_models_of_both_ways_can_choose(model_type: str) -> None:
    base = tiny_model("causal", model_type)
    model = prepared(base)
    ids = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    actual = model(input_ids=ids, use_cache=False).logits
    other = prepared(base, attention="torch")
    torch.testing.assert_close(actual, other(input_ids=ids).logits, rtol=0, atol=1e-5)
    # Longer than the window of Mistral, 8.
    tokens = [m.generate(ids[:, :3], max_new_tokens=14, do_sample=False, eos_token_id=None) for m in (model, other)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("model_type", ["gptj", "gpt_neo", "codegen"])
def test_positions_of_the_sequence_stay_where_they_are_asked_to(model_type: str) -> None:
    base = tiny_model("causal", model_type)
    model = prepared(base, position_offset="none")
    inputs = inputs_of(base, "none")
    expected = from_own_cache(base, model, inputs, position_ids=torch.arange(9)[None])
    check_equal(model, model(**inputs).logits, expected, inputs)
    given = torch.arange(9)[None] + 3
    expected = from_own_cache(base, model, inputs, position_ids=given)
    check_equal(model, model(**inputs, position_ids=given).logits, expected, inputs)
    moved = prepared(base)
    expected = from_own_cache(base, moved, inputs, position_ids=given + 4)
    check_equal(moved, moved(**inputs, position_ids=given).logits, expected, inputs)


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


@pytest.fixture
def two_tasks(tmp_path: Path, request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of the parametrized type with the tasks "default" of 4 tokens and "long" of 6."""
    base = tiny_model("causal", request.param)
    save_prefix_model(prepared(base, 6, init_std=1.0), tmp_path / "long.safetensors")
    model = prepared(base)
    load_named_prefix(model, "long", tmp_path / "long.safetensors")
    return model


def _joined(model: PreTrainedModel, names: list[str]) -> PreTrainedModel:
    """Return a model with one task, whose prefix is those of ``names`` one after another."""
    table = torch.cat([get_named_prefix(model, name).table.detach() for name in names])
    single = remove_prefix(copy.deepcopy(model))
    single = prepared(single, table.shape[0])
    with torch.no_grad():
        single.prefix_encoder.table.copy_(table)
    return single


@pytest.mark.parametrize("two_tasks", ["bloom", "gptj", "gpt_neo", "falcon"], indirect=True)
def test_rows_of_a_batch_see_different_prefixes(two_tasks: PreTrainedModel) -> None:
    model = two_tasks
    ids = torch.randint(3, 90, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    names = ["default", "long", None, ["long", "default"], "default"]
    mixed = model(input_ids=ids, attention_mask=mask, prefix_names=names).logits
    for row, name in enumerate(names):
        wanted = [name] if isinstance(name, str) else name
        one = remove_prefix(copy.deepcopy(model)) if wanted is None else _joined(model, wanted)
        expected = one(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
        seen = mask[row, :, None]
        torch.testing.assert_close(mixed[row] * seen, expected * seen, rtol=0, atol=1e-5)

    arguments = {"input_ids": ids, "attention_mask": mask}
    selection = select_prefixes(model, names)
    torch.testing.assert_close(model(**arguments, prefix_names=selection).logits, mixed)
    with use_prefixes(model, names):
        torch.testing.assert_close(model(**arguments).logits, mixed)
    hidden = model.base_model(**arguments, prefix_names=names).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), mixed)
    tokens = model.generate(**arguments, prefix_names=names, max_new_tokens=3, do_sample=False, eos_token_id=None)
    set_prefix(model, "long")
    alone = model.generate(ids[1:2], attention_mask=mask[1:2], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens[1], alone[0])
    # A call that fails leaves nothing open.
    with pytest.raises(ValueError, match="prefix_names: expected one entry for each of the 5 rows"):
        model(**arguments, prefix_names=["default"])
    with pytest.raises(ValueError, match="prefix_names: expected names among"):
        model(**arguments, prefix_names=["nothing"] * 5)
    torch.testing.assert_close(model(**arguments).logits[1], mixed[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("two_tasks", ["gptj"], indirect=True)
def test_a_mixed_batch_trains_the_tasks_that_its_rows_name(two_tasks: PreTrainedModel) -> None:
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    get_named_prefix(two_tasks, "long").requires_grad_(True)
    loss = two_tasks(input_ids=ids, prefix_names=["long", "default"]).logits.square().sum()
    loss.backward()
    for row, name in enumerate(["long", "default"]):
        single = _joined(two_tasks, [name])
        single(input_ids=ids[row : row + 1]).logits.square().sum().backward()
        torch.testing.assert_close(
            get_named_prefix(two_tasks, name).table.grad, single.prefix_encoder.table.grad, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("two_tasks", ["mvp"], indirect=True)
def test_rows_whose_positions_cannot_differ_are_refused(two_tasks: PreTrainedModel) -> None:
    ids = torch.randint(3, 90, (2, 7))
    with pytest.raises(ValueError, match=r"expected prefixes of one length for all rows.*begin at \[4, 6\]"):
        two_tasks(input_ids=ids, prefix_names=["default", "long"])
    assert two_tasks(input_ids=ids, prefix_names=["long", "long"]).logits.isfinite().all()


@pytest.mark.parametrize("model_type", ["bloom", "gptj"])
def test_activation_checkpointing_changes_nothing(model_type: str) -> None:
    model = prepared(tiny_model("causal", model_type)).train()
    inputs = inputs_of(model, "right")
    model(**inputs).logits.square().sum().backward()
    expected = model.prefix_encoder.table.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model(**inputs)
    assert out.past_key_values is None
    out.logits.square().sum().backward()
    torch.testing.assert_close(model.prefix_encoder.table.grad, expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="gradient checkpointing: expected use_reentrant=False"):
        model(**inputs)


def test_activation_checkpointing_beside_an_encoder_is_refused() -> None:
    model = prepared(tiny_model("seq2seq", "mvp")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="gradient checkpointing: expected a model without an encoder"):
        model(**inputs_of(model, "none"))


def test_a_task_is_stored_and_loaded_also_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from prefix_kernels.integrations.transformers.storage.peft_checkpoint import save_peft_checkpoint

    base = tiny_model("causal", "bloom")
    model = prepared(base)
    inputs = inputs_of(base, "left")
    expected = model(**inputs).logits
    save_prefix_model(model, tmp_path / "task.safetensors")
    torch.testing.assert_close(
        load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")(**inputs).logits, expected
    )
    save_peft_checkpoint(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(**inputs).logits, expected)
    torch.testing.assert_close(load_prefix_model(copy.deepcopy(base), tmp_path / "adapter")(**inputs).logits, expected)
    with pytest.raises(ValueError, match="BloomForCausalLM .*does not go through Transformers' AttentionInterface"):
        accelerate(theirs)


@pytest.mark.parametrize("model_type", ["gptj", "bloom"])
def test_a_prefix_that_begins_as_a_text_is_read_as_the_text(model_type: str) -> None:
    base = tiny_model("causal", model_type)
    model = prepared(base)
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    initialize_from_text(model, ids[:, :4])
    torch.testing.assert_close(model(input_ids=ids[:, 4:]).logits, base(input_ids=ids).logits[:, 4:])


def test_the_prefix_comes_off_and_copies_are_independent() -> None:
    base = tiny_model("causal", "gptj")
    inputs = inputs_of(base, "right")
    model = prepared(base)
    expected = model(**inputs).logits
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        twin.prefix_encoder.table.zero_()
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert not torch.allclose(twin(**inputs).logits, expected)
    assert prefix_layers(model) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    remove_prefix(model)
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
    assert not any("_can_checkpoint_with_cache" in vars(module) for module in model.modules())


def test_a_float32_prefix_serves_a_bfloat16_model() -> None:
    base = tiny_model("causal", "gptj")
    inputs = inputs_of(base, "left")
    half = prepared(copy.deepcopy(base).to(torch.bfloat16))
    out = half(**inputs).logits
    out.float().square().sum().backward()
    assert out.dtype is torch.bfloat16
    assert half.prefix_encoder.table.grad.dtype is torch.float32
    torch.testing.assert_close(out.float(), prepared(base)(**inputs).logits, rtol=0.1, atol=0.1)


def test_compiled_code_gives_the_same() -> None:
    model = prepared(tiny_model("causal", "gptj"))
    inputs = inputs_of(model, "right")
    expected = model(**inputs, use_cache=False).logits
    compiled = torch.compile(model)(**inputs, use_cache=False).logits
    torch.testing.assert_close(compiled, expected)


def test_heads_too_wide_for_the_kernels_have_their_prefix_in_the_cache() -> None:
    narrow = tiny_model("causal", "gemma4_text")
    settings = {name: x for name, x in narrow.config.to_dict().items() if name != "per_layer_config"}
    base = type(narrow)(type(narrow.config)(**settings, global_head_dim=512)).eval()
    with pytest.warns(UserWarning, match="expected a head dim of at most 256, got 512. So the prefix lies in the key"):
        model = prepared(base, attention="prefix_kernels")
    inputs = inputs_of(base, "right")
    check_equal(model, model(**inputs).logits, from_own_cache(base, model, inputs), inputs)


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
        ("hrm_text", {}, "HrmTextForCausalLM .*is not supported: it calls its stacks several times"),
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
