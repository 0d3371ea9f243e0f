"""Models of images with a prefix, and of images and texts: tiny random models of every family."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_checks import (
    Family,
    P,
    check_activation_checkpointing,
    check_against_eager,
    check_bfloat16,
    check_compiled,
    check_mixed_batch,
    check_torch_baseline,
    check_training,
    prepared,
    tables,
    trainable,
)
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
)
from transformers.modeling_outputs import ImageClassifierOutput

from prefix_kernels.integrations.transformers import PrefixTuningConfig, load_prefix_model, save_prefix_model

LENGTH, VOCABULARY, END = 9, 99, 98
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {"image_size": 16, "patch_size": 8}


def tiny_vit(model_class: type = ViTForImageClassification) -> PreTrainedModel:
    """A random model whose weights are large enough for every gradient to matter, in eval mode."""
    others = {"initializer_range": 0.3, "num_labels": 3, "attention_probs_dropout_prob": 0.1, "encoder_stride": 8}
    return model_class(model_class.config_class(**SIZES, **IMAGE, **others)).eval()


def clip_config() -> CLIPConfig:
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 97, "eos_token_id": END}
    others = {"attention_dropout": 0.1, "initializer_factor": 2.0, "projection_dim": 16}
    # The towers differ in depth and in the shape of their heads.
    text = SIZES | tokens | others | {"max_position_embeddings": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = SIZES | IMAGE | others | {"initializer_range": 0.3}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=2.0, num_labels=3)


class ClipWithLabels(CLIPModel):
    """CLIP's model with the outputs of a classifier: which text belongs to each image?"""

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> ImageClassifierOutput:
        output = super().forward(**inputs, return_loss=labels is not None)
        return ImageClassifierOutput(loss=output.loss, logits=output.logits_per_image)


def tiny_clip(model_class: type = ClipWithLabels) -> PreTrainedModel:
    config = clip_config()
    if model_class in (CLIPTextModel, CLIPTextModelWithProjection):
        config = config.text_config
    if model_class in (CLIPVisionModel, CLIPVisionModelWithProjection):
        config = config.vision_config
    return model_class(config).eval()


def images(_: str = "none") -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16)}


def texts(padding: str) -> dict[str, Tensor]:
    """Three rows of up to nine tokens with an end; with ``padding`` the second has six and the third three."""
    input_ids = torch.randint(3, 97, (3, LENGTH))
    input_ids[:, -1] = END
    if padding == "none":
        return {"input_ids": input_ids}
    attention_mask = torch.ones_like(input_ids)
    for row, absent in enumerate([0, 3, 6]):
        attention_mask[row, :absent] = 0
        input_ids[row, :absent] = 0
    if padding == "right":
        input_ids, attention_mask = (
            torch.stack([row.roll(-absent) for row, absent in zip(tensor, [0, 3, 6], strict=True)])
            for tensor in (input_ids, attention_mask)
        )
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def images_and_texts(padding: str) -> dict[str, Tensor]:
    return images() | texts(padding)


def one_class_each(inputs: dict[str, Tensor]) -> Tensor:
    return torch.arange(3)


def clip(name: str, **settings: object) -> Family:
    return Family(name, tiny_clip, images_and_texts, one_class_each, settings=settings)


FAMILIES = [
    Family("vit", tiny_vit, images, one_class_each, paddings=("none",)),
    Family("deit", functools.partial(tiny_vit, DeiTForImageClassification), images, one_class_each, paddings=("none",)),
    Family(
        "clip classifier",
        functools.partial(tiny_clip, CLIPForImageClassification),
        images,
        one_class_each,
        paddings=("none",),
    ),
    clip("clip"),
    clip("clip text", target_attentions=["text"]),
    clip("clip vision", target_attentions=["vision"]),
]
CLIP = FAMILIES[3]


def of_each(families: list[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families, ids=lambda one: one.name)


@pytest.mark.parametrize(
    ("family", "padding"),
    [pytest.param(one, padding, id=f"{one.name}-{padding}") for one in FAMILIES for padding in one.paddings],
)
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


@of_each(FAMILIES[:4])
def test_a_compiled_model_is_one_graph_and_gives_the_same(family: Family) -> None:
    check_compiled(family, family.paddings[-1])


@of_each(FAMILIES)
def test_a_bfloat16_model_and_autocast_take_a_float32_prefix(family: Family) -> None:
    check_bfloat16(family)


@of_each(FAMILIES[:3])
def test_images_have_no_positions_to_move(family: Family) -> None:
    base = family.model()
    moved, kept = prepared(family, base), prepared(family, base, position_offset="none")
    kept.prefix_encoder.load_state_dict(moved.prefix_encoder.state_dict())
    inputs = family.inputs("none")
    assert torch.equal(moved(**inputs).logits, kept(**inputs).logits)


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (tiny_vit, {"classifier"}),
        (lambda: tiny_vit(ViTForMaskedImageModeling), set()),
        (
            lambda: tiny_vit(DeiTForImageClassificationWithTeacher),
            {"cls_classifier", "distillation_classifier"},
        ),
        (lambda: tiny_clip(CLIPForImageClassification), {"classifier"}),
        (tiny_clip, set()),
        (lambda: tiny_clip(CLIPVisionModelWithProjection), set()),
    ],
)
def test_a_head_that_starts_at_random_is_trained_and_a_pretrained_one_is_not(
    build: Callable[[], PreTrainedModel], heads: set[str]
) -> None:
    model = prepared(CLIP, build())
    assert {name.split(".")[0] for name in trainable(model)} == heads | {"prefix_encoder"}


def test_the_towers_of_clip_have_prefixes_of_their_own_shape() -> None:
    model = prepared(CLIP, CLIP.model(), num_virtual_tokens={"text": 3, "vision": [4, 6]}, position_offset="none")
    shapes = {name: tuple(encoder.table.shape) for name, encoder in model.prefix_encoder.items()}
    assert shapes == {"text": (3, 6, 2, 16), "vision": (4, 2, 4, 8), "vision_1": (6, 2, 4, 8)}
    with pytest.raises(ValueError, match=r"target_attentions: expected names among \['text', 'vision'\], got 'self'"):
        prepared(CLIP, CLIP.model(), target_attentions=["self"])


@pytest.mark.parametrize("position_offset", ["peft", "none"])
def test_the_features_of_a_tower_called_alone_are_those_of_the_whole_model(position_offset: str) -> None:
    model = prepared(CLIP, tiny_clip(CLIPModel), position_offset=position_offset)
    inputs = images_and_texts("right")
    both = model(**inputs)
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    image = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(text / text.norm(dim=-1, keepdim=True), both.text_embeds)
    torch.testing.assert_close(image / image.norm(dim=-1, keepdim=True), both.image_embeds)


def test_the_positions_of_a_text_begin_behind_its_prefix_and_only_there() -> None:
    base = tiny_clip(CLIPModel)
    inputs = images_and_texts("right")
    behind = torch.arange(P, P + LENGTH).expand(3, -1)
    for towers, expected in {("text", "vision"): True, ("text",): True, ("vision",): False}.items():
        shifted = prepared(CLIP, base, target_attentions=towers)
        kept = prepared(CLIP, base, target_attentions=towers, position_offset="none")
        kept.prefix_encoder.load_state_dict(shifted.prefix_encoder.state_dict())
        positions = {"position_ids": behind} if expected else {}
        torch.testing.assert_close(shifted(**inputs).logits_per_image, kept(**inputs, **positions).logits_per_image)
    too_long = torch.randint(3, 97, (2, 24))
    with pytest.raises(ValueError, match=r"24 tokens do not fit.*leaves 19.*position_offset='none'"):
        prepared(CLIP, base).get_text_features(too_long)


@pytest.mark.parametrize(
    ("tower", "whole", "inputs"),
    [
        (CLIPTextModel, CLIPTextModelWithProjection, functools.partial(texts, "right")),
        (CLIPVisionModel, CLIPVisionModelWithProjection, images),
    ],
    ids=["text", "vision"],
)
def test_a_tower_with_a_projection_is_the_tower(tower: type, whole: type, inputs: Callable) -> None:
    plain, projected = tiny_clip(tower), tiny_clip(whole)
    projected.base_model.load_state_dict(plain.state_dict())
    models = [prepared(CLIP, model, position_offset="peft") for model in (plain, projected)]
    models[1].prefix_encoder.load_state_dict(models[0].prefix_encoder.state_dict())
    given = inputs()
    first, second = (model(**given).last_hidden_state for model in models)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, tower.forward(copy.deepcopy(plain), **given).last_hidden_state, atol=1e-2)


def test_a_saved_task_of_both_towers_gives_the_same_logits_in_a_fresh_model(tmp_path: Path) -> None:
    base = CLIP.model()
    model = prepared(CLIP, base)
    save_prefix_model(model, tmp_path / "task.safetensors")
    loaded = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")
    assert isinstance(loaded.prefix_tuning_config, PrefixTuningConfig) and len(tables(loaded)) == 2
    inputs = images_and_texts("left")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@of_each(FAMILIES)
def test_the_torch_baseline_is_the_same_model(family: Family) -> None:
    check_torch_baseline(family, family.paddings[-1])


@of_each(FAMILIES[:3])
def test_rows_of_a_batch_see_the_prefixes_that_they_name(tmp_path: Path, family: Family) -> None:
    check_mixed_batch(family, tmp_path)


@of_each(FAMILIES)
def test_attention_weights_are_refused_with_the_reason(family: Family) -> None:
    model = prepared(family, family.model())
    with pytest.raises(ValueError, match="output_attentions=True: the attention weights are never formed"):
        model(**family.inputs("none"), output_attentions=True)
