"""Prefixes in the key/value cache, of models whose attention function cannot be replaced (``attention="cache"``)."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from cached_prefixes import check_equal, from_own_cache, prepared

from benchmarks.compatibility.family_trial import inputs_of
from benchmarks.compatibility.model_types import tiny_model
from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers import (
    initialize_from_text,
    load_prefix_model,
    prefix_layers,
    remove_prefix,
    save_prefix_model,
)

DECODERS = [
    *("bloom", "codegen", "doge", "falcon", "gemma4_text", "got_ocr2", "gpt_neo", "gpt_neox_japanese"),
    *("gptj", "jetmoe", "mvp", "trocr", "xglm"),
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
    with pytest.warns(UserWarning, match="gradient checkpointing uses no cache, so the given one is left out"):
        model(**inputs, past_key_values=transformers.DynamicCache())
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
    with pytest.warns(UserWarning, match="BloomForCausalLM .*does not go through Transformers' AttentionInterface"):
        torch.testing.assert_close(accelerate(theirs)(**inputs).logits, expected)


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
