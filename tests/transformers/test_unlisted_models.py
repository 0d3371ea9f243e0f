"""Models that no list names: what their modules do not say is found another way, or refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.compatibility.model_types import tiny_model
from benchmarks.compatibility.own_attention import concatenated
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
    set_prefix,
)
from prefix_kernels.integrations.transformers.attention import call as attention_call
from prefix_kernels.integrations.transformers.attention import masks
from prefix_kernels.integrations.transformers.attention.interface import prefix_attention_forward
from prefix_kernels.integrations.transformers.hooks import attach
from prefix_kernels.integrations.transformers.runtime.call_prefixes import CallPrefixes
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import save_peft_checkpoint


class Attention(nn.Module):
    """A module that is all that an attention function looks at."""

    is_causal = True
    prefix_site = 0


def prepared(base: PreTrainedModel, **settings: object) -> PreTrainedModel:
    torch.manual_seed(1)
    return get_prefix_model(base, PrefixTuningConfig(num_virtual_tokens=4, modules_to_save=(), **settings))


def prefix(heads: int = 2, head_dim: int = 8) -> CallPrefixes:
    return CallPrefixes({0: (torch.randn(heads, 3, head_dim), torch.randn(heads, 3, head_dim))})


@pytest.mark.parametrize("shape", [(1, 4, 5, 8), (1, 2, 5, 4)])
def test_keys_of_another_shape_than_the_module_told_are_refused(shape: tuple[int, ...]) -> None:
    states = torch.randn(shape)
    with pytest.raises(
        ValueError,
        match=rf"Attention of prefix 0: expected keys of 2 heads and head dim 8.*got {shape[1]} and {shape[3]}",
    ):
        prefix_attention_forward(Attention(), states, states, states, None, call_prefixes=prefix())


def test_operands_without_unit_stride_are_copied_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_call, "_warned_strides", set())
    query = torch.randn(1, 2, 5, 8)
    key = torch.randn(1, 2, 8, 5).transpose(2, 3)
    prefixes = prefix()
    with pytest.warns(UserWarning, match="Attention: key has stride 5 in its last dimension") as caught:
        out, _ = prefix_attention_forward(Attention(), query, key, query, None, call_prefixes=prefixes)
        prefix_attention_forward(Attention(), query, key, query, None, call_prefixes=prefixes)
    assert len(caught) == 1
    expected, _ = prefix_attention_forward(Attention(), query, key.contiguous(), query, None, call_prefixes=prefixes)
    assert torch.equal(out, expected)


def test_a_position_bias_that_the_prefix_has_no_part_of_is_refused_where_it_has_positions() -> None:
    query, bias = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 5)
    prefixes = prefix()
    prefix_attention_forward(Attention(), query, query, query, None, position_bias=bias, call_prefixes=prefixes)
    prefixes.counts_positions = True
    with pytest.raises(ValueError, match="position_offset: expected 'none', because the position bias that Attention"):
        prefix_attention_forward(Attention(), query, query, query, None, position_bias=bias, call_prefixes=prefixes)


def logits_and_gradient(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=ids).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), [model.prefix_encoder.table])
    return logits.detach(), gradient


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_that_hand_nothing_on_have_their_prefix_again_under_checkpointing(use_reentrant: bool) -> None:
    base = tiny_model("causal", "stablelm")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = prepared(copy.deepcopy(base))
    plain.prefix_encoder.table.requires_grad_()
    expected = logits_and_gradient(plain.train(), ids)
    model = prepared(copy.deepcopy(base))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    logits = model(input_ids=ids).logits
    logits.square().sum().backward()
    torch.testing.assert_close(logits.detach(), expected[0])
    torch.testing.assert_close(model.prefix_encoder.table.grad, expected[1])


def test_a_copy_of_a_model_with_such_layers_runs_with_its_own_prefix() -> None:
    model = prepared(tiny_model("causal", "stablelm"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.prefix_encoder.table.zero_()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    assert (model(input_ids=ids).logits - other(input_ids=ids).logits).abs().max() > 1e-4


def test_the_plain_model_comes_back_whole() -> None:
    base = tiny_model("causal", "stablelm")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    model = remove_prefix(prepared(copy.deepcopy(base)))
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    for (name, module), (_, other) in zip(model.named_modules(), base.named_modules(), strict=True):
        assert vars(module).keys() == vars(other).keys(), name


def windows_that_only_masks_know() -> PreTrainedModel:
    base = tiny_model("causal", "phimoe")
    base.config.layer_types = ["sliding_attention", "full_attention"]
    return base


def test_a_window_that_only_the_mask_knows_cannot_hold_the_prefix() -> None:
    with pytest.raises(
        ValueError, match="window_includes_prefix: expected False, because PhimoeAttention does not say"
    ):
        prepared(windows_that_only_masks_know(), window_includes_prefix=True)


@pytest.mark.parametrize("window_includes_prefix", [False, True])
def test_a_window_of_all_layers_is_a_rule_and_no_mask(window_includes_prefix: bool) -> None:
    base = tiny_model("causal", "phimoe")
    ids = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(input_ids=ids).logits
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    model = prepared(base, window_includes_prefix=window_includes_prefix)
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(input_ids=ids)
    assert seen == [None]
    assert {site.module.prefix_window for site in attach.find_sites(model)} == {base.config.sliding_window}
    remove_prefix(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain)


def test_a_model_that_takes_no_positions_keeps_its_own_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "position_modules", lambda model, stacks: {})
    with pytest.warns(UserWarning, match="LlamaForCausalLM takes no position_ids, so its sequence keeps its own"):
        prepared(tiny_model("causal", "llama"))


@pytest.mark.parametrize(
    ("kind", "model_type", "message"),
    [
        ("causal", "deepseek_v32", "layers.0.self_attn: expected attention to all visible keys, got one that chooses"),
    ],
)
def test_models_that_would_be_wrong_are_refused_with_the_reason(kind: str, model_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tiny_model(kind, model_type))


@pytest.mark.parametrize("role", ["encoder", "decoder", "cross"])
def test_windows_to_both_sides_are_those_of_the_masks_wherever_the_prefix_is(role: str) -> None:
    base = tiny_model("seq2seq", "t5gemma")
    model = prepared(copy.deepcopy(base), position_offset="none", init_std=0.5, target_attentions=[role])
    layout = model._prefix_state.tasks.layout
    (pairs,) = (layout.pairs(model.prefix_encoder, stack) for stack in layout.stacks)
    modules = dict(base.named_modules())
    prefixes = {modules[name]: [pairs[index]] for index, name in enumerate(prefix_layers(model))}
    ids = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))  # longer than the windows, of 8
    with concatenated(base, prefixes):
        expected = base(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def latent_attention() -> PreTrainedModel:
    """A model whose keys and values have different head dims."""
    return tiny_model("causal", "deepseek_v3")


def test_a_task_of_a_model_with_latent_attention_is_stored_and_loaded(tmp_path: Path) -> None:
    base = latent_attention()
    model = prepared(copy.deepcopy(base), prefix_projection=True).eval()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    save_prefix_model(model, tmp_path / "task.safetensors")
    loaded = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)

    load_named_prefix(loaded, "other", tmp_path / "task.safetensors")
    with torch.no_grad():
        get_named_prefix(loaded, "other").table.mul_(2)
        mixed = loaded(input_ids=ids, prefix_names=["other", "default"]).logits
        torch.testing.assert_close(mixed[1], loaded(input_ids=ids).logits[1])
        set_prefix(loaded, "other")
        torch.testing.assert_close(mixed[0], loaded(input_ids=ids).logits[0])


def test_latent_attention_begins_as_if_it_had_read_a_text() -> None:
    base = latent_attention()
    text = torch.tensor([[5, 6, 7, 8]])
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    model = prepared(copy.deepcopy(base), position_offset="peft").eval()
    initialize_from_text(model, text)
    whole = base(input_ids=torch.cat([text.expand(2, -1), ids], dim=1)).logits[:, 4:]
    torch.testing.assert_close(model(input_ids=ids).logits, whole, rtol=1e-4, atol=1e-5)


def test_pefts_checkpoints_have_no_values_of_another_head_dim(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected values of head dim 16, as the keys, because PEFT has one for both"):
        save_peft_checkpoint(prepared(latent_attention(), position_offset="peft"), tmp_path)


def test_masks_that_have_to_say_everything_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_warned_dense", set())
    model = prepared(windows_that_only_masks_know())
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"phimoe: its attention pattern .* slower and larger") as caught:
        model(input_ids=ids)
        model(input_ids=ids)
    assert len([one for one in caught if "slower and larger" in str(one.message)]) == 1


def test_the_attentions_with_a_prefix_are_named() -> None:
    assert prefix_layers(prepared(tiny_model("causal", "jamba"))) == ["model.layers.1.self_attn"]
    shared = prepared(tiny_model("masked", "albert"))
    assert prefix_layers(shared) == [prefix_layers(shared)[0]] * shared.config.num_hidden_layers
    with pytest.raises(ValueError, match="expected a model prepared by get_prefix_model, got a plain Jamba"):
        prefix_layers(tiny_model("causal", "jamba"))
