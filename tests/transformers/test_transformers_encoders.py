"""Encoders of text with a prefix: tiny random models of every family."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from family_checks import (
    Family,
    P,
    check_activation_checkpointing,
    check_against_eager,
    check_against_peft,
    check_bfloat16,
    check_compiled,
    check_mixed_batch,
    check_torch_baseline,
    check_training,
    prepared,
    tables,
    trainable,
    without_dropout,
)
from family_checks import (
    text_batch as batch,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.models.albert.modeling_albert import AlbertAttention, AlbertLayer, AlbertLayerGroup

from prefix_kernels.integrations.transformers import load_prefix_model, save_prefix_model
from prefix_kernels.integrations.transformers.attention.interface import prefix_attention

LENGTH, VOCABULARY = 9, 99


def tiny(
    name: str, settings: dict[str, object], auto_class: type = AutoModelForSequenceClassification, **more: object
) -> PreTrainedModel:
    """A random model whose weights are large enough for every gradient to matter, in eval mode."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 97, "eos_token_id": 98, "cls_token_id": 97, "sep_token_id": 98}
    others = {"pad_token_id": 0, "max_position_embeddings": 64, "initializer_range": 0.3, "num_labels": 3}
    config = AutoConfig.for_model(name, **(sizes | tokens | others | settings | more))
    return auto_class.from_config(config).eval()


def class_of_each_row(inputs: dict[str, Tensor]) -> Tensor:
    return torch.arange(len(inputs["input_ids"]))


def class_of_each_token(inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return (inputs["input_ids"] % 3).masked_fill(mask == 0, -100)


def family(name: str, peft_task: str | None = None, pad: int = 0, **settings: object) -> Family:
    return Family(
        name,
        functools.partial(tiny, name, {"pad_token_id": pad} | settings),
        functools.partial(batch, pad=pad),
        class_of_each_row,
        peft_task=peft_task,
    )


def with_head(one: Family, auto_class: type, labels: object) -> Family:
    # Smaller weights: logits of a hundred would carry rounding errors of more than 1e-5.
    model = functools.partial(one.model, auto_class=auto_class, initializer_range=0.2)
    return Family(one.name, model, one.inputs, labels)


def checkpoint_albert(model: PreTrainedModel, use_reentrant: bool, around: type = AlbertLayer) -> None:
    """Transformers has no activation checkpointing of ALBERT: by torch's own wrapper."""
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: isinstance(module, around),
    )


def albert(**settings: object) -> Family:
    sizes = {"embedding_size": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1} | settings
    return Family(
        "albert",
        functools.partial(tiny, "albert", sizes),
        batch,
        class_of_each_row,
        checkpoint=checkpoint_albert,
    )


DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
MODERNBERT = {
    "num_hidden_layers": 3,
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
    "initializer_cutoff_factor": 3.0,
    "attention_dropout": 0.1,
}
FAMILIES = [
    family("bert", "SEQ_CLS"),
    family("roberta", "SEQ_CLS", pad=1),
    family("electra", "SEQ_CLS", embedding_size=16),
    family("distilbert", **DISTILBERT),
    albert(num_hidden_layers=4, num_hidden_groups=2),
    family("modernbert", **MODERNBERT),
]
OF_PEFT = [one for one in FAMILIES if one.peft_task is not None]
OURS_ALONE = [one for one in FAMILIES if one.peft_task is None]
# Two layers in each of two groups, which are called one, one, two, two.
NESTED_ALBERT = albert(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2, initializer_range=0.2)


def of_each(families: list[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families, ids=lambda one: one.name)


paddings = pytest.mark.parametrize("padding", ["none", "right", "left"])
checkpointings = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


@paddings
@of_each(OF_PEFT)
def test_logits_and_prefix_gradients_are_those_of_peft(family: Family, padding: str) -> None:
    check_against_peft(family, padding)


@paddings
@of_each(FAMILIES)
def test_logits_and_prefix_gradients_are_those_of_the_oracle(family: Family, padding: str) -> None:
    check_against_eager(family, padding)


@paddings
@pytest.mark.parametrize("auto_class", [AutoModelForTokenClassification, AutoModelForMaskedLM])
@of_each(FAMILIES)
def test_a_head_for_every_token_gets_what_the_oracle_gives(family: Family, auto_class: type, padding: str) -> None:
    check_against_eager(with_head(family, auto_class, class_of_each_token), padding)


@of_each(OURS_ALONE)
def test_positions_begin_behind_the_prefix_as_they_do_in_peft(family: Family) -> None:
    base = family.model()
    shifted, plain = prepared(family, base), prepared(family, base, position_offset="none")
    plain.prefix_encoder.load_state_dict(shifted.prefix_encoder.state_dict())
    inputs = family.inputs("right")
    behind = torch.arange(P, P + LENGTH).expand(3, -1)
    hidden = plain.base_model(**inputs, position_ids=behind).last_hidden_state
    torch.testing.assert_close(shifted.base_model(**inputs).last_hidden_state, hidden)
    given = shifted.base_model(**inputs, position_ids=behind - P).last_hidden_state
    torch.testing.assert_close(given, hidden)


@of_each(FAMILIES)
def test_a_prefix_is_trained_and_nothing_else(family: Family) -> None:
    check_training(family)


@pytest.mark.parametrize("projection", [False, True], ids=["table", "projection"])
@checkpointings
@of_each(FAMILIES)
def test_activation_checkpointing_gives_the_same_gradients(
    family: Family, use_reentrant: bool, projection: bool
) -> None:
    check_activation_checkpointing(family, use_reentrant, projection)


@of_each(FAMILIES)
def test_a_compiled_model_is_one_graph_and_gives_the_same(family: Family) -> None:
    check_compiled(family, "right")


@of_each(FAMILIES)
def test_a_bfloat16_model_and_autocast_take_a_float32_prefix(family: Family) -> None:
    check_bfloat16(family)


@pytest.mark.parametrize("padding", ["none", "left"])
@of_each(FAMILIES)
def test_the_torch_baseline_is_the_same_model(family: Family, padding: str) -> None:
    check_torch_baseline(family, padding)


@of_each(FAMILIES)
def test_inputs_embeds_give_what_input_ids_give(family: Family) -> None:
    model = prepared(family, family.model())
    inputs = family.inputs("none")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    by_embeddings = model.base_model(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(by_embeddings, model.base_model(**inputs).last_hidden_state)


@of_each(FAMILIES)
def test_rows_of_a_batch_see_the_prefixes_that_they_name(tmp_path: Path, family: Family) -> None:
    check_mixed_batch(family, tmp_path)


@of_each(FAMILIES)
def test_attention_weights_are_refused_with_the_reason(family: Family) -> None:
    model = prepared(family, family.model())
    with pytest.raises(ValueError, match="output_attentions=True: the attention weights are never formed"):
        model(**family.inputs("none"), output_attentions=True)


@of_each(FAMILIES)
def test_switching_the_attention_implementation_cannot_silently_drop_the_prefix(family: Family) -> None:
    model = prepared(family, family.model())
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="implementation is 'sdpa', which would ignore the prefix"):
        model(**family.inputs("none"))


@pytest.mark.parametrize(
    ("name", "auto_class", "heads"),
    [
        ("distilbert", AutoModelForSequenceClassification, {"pre_classifier", "classifier"}),
        ("distilbert", AutoModelForQuestionAnswering, {"qa_outputs"}),
        ("electra", AutoModelForSequenceClassification, {"classifier"}),
        ("electra", AutoModelForMultipleChoice, {"sequence_summary", "classifier"}),
        ("albert", AutoModelForTokenClassification, {"classifier"}),
        ("modernbert", AutoModelForSequenceClassification, {"classifier"}),
        *[(one.name, AutoModelForMaskedLM, set()) for one in FAMILIES],
    ],
)
def test_a_head_that_starts_at_random_is_trained_and_a_pretrained_one_is_not(
    name: str, auto_class: type, heads: set[str]
) -> None:
    one = next(one for one in FAMILIES if one.name == name)
    model = prepared(one, one.model(auto_class=auto_class, num_labels=2))
    assert {parameter.split(".")[0] for parameter in trainable(model)} == heads | {"prefix_encoder"}


@of_each([one for one in FAMILIES if one.name in ("distilbert", "albert")])
def test_a_saved_task_gives_the_same_logits_in_a_fresh_model(tmp_path: Path, family: Family) -> None:
    base = family.model()
    model = prepared(family, base)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_()
    save_prefix_model(model, tmp_path / "task.safetensors")
    loaded = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")
    inputs = family.inputs("right")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


# ModernBERT


def test_the_windows_of_modernbert_are_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        seen.append((kwargs["attn_mask"], kwargs["window_size"], kwargs["is_causal"]))
        return prefix_attention(*args, **kwargs)

    monkeypatch.setattr("prefix_kernels.integrations.transformers.attention.interface.prefix_attention", spy)
    one = next(one for one in FAMILIES if one.name == "modernbert")
    model = prepared(one, one.model())
    for padding in ("none", "left"):
        seen.clear()
        model(**one.inputs(padding))
        assert [window for _, window, _ in seen] == [(-1, -1), (2, 2), (-1, -1)]
        for mask, _, is_causal in seen:
            assert not is_causal
            assert (mask is None) if padding == "none" else mask.shape == (3, 1, 1, LENGTH)


def test_the_prefix_of_modernbert_can_slide_out_of_sight() -> None:
    """A window that counts the prefix as positions before the sequence leaves the last token none of it."""
    one = next(one for one in FAMILIES if one.name == "modernbert")
    model = prepared(one, without_dropout(one.model()), layers=[1], window_includes_prefix=True)
    hidden = {}
    model.base_model.layers[1].register_forward_hook(lambda _, args, output: hidden.update(out=output))
    inputs = one.inputs("none")
    model(**inputs)
    hidden["out"][:, 2:].sum().backward(retain_graph=True)
    assert tables(model)[0].grad.abs().max() == 0
    hidden["out"][:, :2].sum().backward()
    reached = tables(model)[0].grad.abs().amax((1, 2, 3)) > 0
    assert reached.tolist() == [False, False, False, True, True]


# ALBERT: the layers of a group are one module


def attention_outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What each call of an attention in an ALBERT model gives."""
    outputs: list[Tensor] = []
    attentions = [module for module in model.modules() if isinstance(module, AlbertAttention)]
    hooks = [one.register_forward_hook(lambda _, args, output: outputs.append(output[0])) for one in attentions]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return outputs


def test_every_depth_of_albert_has_a_prefix_of_its_own() -> None:
    for one, depths in {FAMILIES[4]: 4, NESTED_ALBERT: 8}.items():
        model = prepared(one, one.model())
        assert tables(model)[0].shape == (P, 2 * depths, 4, 8)
        inputs = one.inputs("none")
        before = attention_outputs(model, inputs)
        assert len(before) == depths
        for depth in range(depths):
            with torch.no_grad():
                tables(model)[0][:, 2 * depth] += 1
            after = attention_outputs(model, inputs)
            unchanged = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
            assert unchanged == [True] * depth + [False] * (depths - depth)
            before = after


@paddings
def test_layers_inside_the_groups_of_albert_agree_with_the_oracle(padding: str) -> None:
    check_against_eager(NESTED_ALBERT, padding)


def test_a_depth_of_albert_without_a_prefix_has_none() -> None:
    one = albert(num_hidden_layers=3)
    base = one.model()
    inputs = one.inputs("right")
    model = prepared(one, base, layers=[1], position_offset="none")
    outputs, plain = attention_outputs(model, inputs), attention_outputs(base, inputs)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs[0][valid], plain[0][valid])
    assert not torch.allclose(outputs[1][valid], plain[1][valid], atol=1e-2)

    # The last depth sees what the second changed, and no prefix of its own.
    last: list[Tensor] = []
    group = model.base_model.encoder.albert_layer_groups[0]
    group.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    model(**inputs)
    expected, _ = (
        base.base_model.encoder.albert_layer_groups[0].albert_layers[0].attention(last[2], valid[:, None, None, :])
    )
    torch.testing.assert_close(outputs[2][valid], expected[valid])


@pytest.mark.parametrize("before", [True, False], ids=["wrapped before", "wrapped after"])
@checkpointings
def test_a_checkpointed_group_of_albert_runs_again_with_the_prefixes_of_its_depth(
    use_reentrant: bool, before: bool
) -> None:
    base = without_dropout(NESTED_ALBERT.model())
    plain = prepared(NESTED_ALBERT, base).train()
    inputs = NESTED_ALBERT.inputs("right")
    labels = NESTED_ALBERT.labels(inputs)
    plain(**inputs, labels=labels).loss.backward()

    if before:
        checkpoint_albert(base, use_reentrant, AlbertLayerGroup)
    model = prepared(NESTED_ALBERT, base).train()
    model.prefix_encoder.load_state_dict(plain.prefix_encoder.state_dict())
    if not before:
        checkpoint_albert(model, use_reentrant, AlbertLayerGroup)
    if use_reentrant and not before:
        with pytest.raises(RuntimeError, match="runs without gradients in a forward pass that needs them"):
            model(**inputs, labels=labels)
        return
    model(**inputs, labels=labels).loss.backward()
    torch.testing.assert_close(tables(model)[0].grad, tables(plain)[0].grad)


def test_a_checkpoint_that_copies_the_input_of_a_shared_layer_is_refused() -> None:
    model = prepared(NESTED_ALBERT, NESTED_ALBERT.model()).train()
    checkpoint_albert(model, False, AlbertLayerGroup)
    model.base_model.encoder.albert_layer_groups = nn.ModuleList(
        offload_wrapper(group) for group in model.base_model.encoder.albert_layer_groups
    )
    inputs = NESTED_ALBERT.inputs("right")
    loss = model(**inputs, labels=NESTED_ALBERT.labels(inputs)).loss
    with pytest.raises(RuntimeError, match="ran again on an input that this forward pass did not give it"):
        loss.backward()
