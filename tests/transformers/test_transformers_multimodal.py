"""A decoder that reads images beside text, Gemma 3: the prefix is in its language model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from family_checks import (
    Family,
    check_activation_checkpointing,
    check_against_eager,
    check_against_peft,
    check_bfloat16,
    check_compiled,
    check_generation,
    check_mixed_batch,
    check_torch_baseline,
    check_training,
    prepared,
)
from image_text_families import IMAGES, LENGTH, TEXT, text, text_with_images, tiny_gemma3

from benchmarks.compatibility.model_types import tiny_model
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_prefix_model,
    prefix_layers,
)
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import save_peft_checkpoint

each = pytest.mark.parametrize("family", [TEXT, IMAGES], ids=lambda family: family.name)
paddings = pytest.mark.parametrize("padding", ["none", "right", "left"])


@paddings
@each
def test_logits_and_prefix_gradients_are_those_of_the_eager_model(family: Family, padding: str) -> None:
    check_against_eager(family, padding)


@paddings
def test_logits_and_prefix_gradients_are_those_of_peft(padding: str) -> None:
    check_against_peft(TEXT, padding, window_includes_prefix=True)


@each
def test_a_prefix_is_trained_and_nothing_else(family: Family) -> None:
    check_training(family)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@each
def test_activation_checkpointing_gives_the_same_gradients(family: Family, use_reentrant: bool) -> None:
    check_activation_checkpointing(family, use_reentrant, projection=False)


@each
def test_generated_tokens_are_those_of_full_recomputation(family: Family) -> None:
    check_generation(family)


@each
def test_rows_of_a_batch_see_the_prefixes_that_they_name(family: Family, tmp_path: Path) -> None:
    check_mixed_batch(family, tmp_path)


@paddings
@each
def test_the_torch_baseline_is_the_same_model(family: Family, padding: str) -> None:
    check_torch_baseline(family, padding)


@each
def test_a_compiled_model_is_one_graph_with_the_same_results(family: Family) -> None:
    check_compiled(family, "right")


@each
def test_a_bfloat16_model_takes_a_float32_prefix(family: Family) -> None:
    check_bfloat16(family)


def test_positions_begin_behind_the_prefix() -> None:
    """Those of tokens of images, too: each row is one sequence."""
    base, inputs = tiny_gemma3(), text_with_images("none")
    moved, kept = prepared(IMAGES, base), prepared(IMAGES, base, position_offset="none")
    kept.load_state_dict(moved.state_dict())
    positions = torch.arange(LENGTH).expand(3, -1) + 5
    torch.testing.assert_close(moved(**inputs).logits, kept(**inputs, position_ids=positions).logits)


def test_a_task_goes_to_peft_and_back(tmp_path: Path) -> None:
    base, inputs = tiny_gemma3(), text("left")
    model = prepared(TEXT, base, window_includes_prefix=True)
    save_peft_checkpoint(model, tmp_path, task_type="CAUSAL_LM")
    again = load_prefix_model(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_prefix_that_slides_out_of_sight_between_images_is_refused() -> None:
    model = prepared(IMAGES, tiny_gemma3(), window_includes_prefix=True)
    with pytest.raises(NotImplementedError, match="window_includes_prefix=True: a mask of four dimensions"):
        model(**text_with_images("none"))


def test_a_prefix_in_the_image_tower_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_attentions: expected names among \['self'\], got 'vision'"):
        get_prefix_model(tiny_gemma3(), PrefixTuningConfig(target_attentions=["vision"]))


def test_layers_that_attend_to_an_image_have_no_prefix_and_text_alone_trains_every_other() -> None:
    base = tiny_model("image-text-to-text", "mllama")
    assert base.config.text_config.cross_attention_layers == [1]
    model = get_prefix_model(base, PrefixTuningConfig(num_virtual_tokens=2))
    assert prefix_layers(model) == ["model.language_model.layers.0.self_attn"]
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    for parameter in model.prefix_encoder.parameters():
        assert parameter.grad.abs().amax((0, 2, 3)).min() > 0
