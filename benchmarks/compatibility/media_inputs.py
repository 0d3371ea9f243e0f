"""Images and sound for tiny models that read them beside text, found by what changes a model's logits.

There is no list of model types: a model gets the first of a few forms of input that its ``forward`` takes and that its
logits depend on. Its text has as many image tokens as the model makes features of an image.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

ROWS, TEXT_BEFORE, TEXT_AFTER, PADDING = 2, 3, 4, 3
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_soft_token_id", "img_context_id")
AUDIO_TOKENS = ("audio_token_id", "audio_token_index", "audio_soft_token_id")
TILES = 4
# Numbers of tokens to try for models without get_image_features or get_audio_features.
_COUNTS = (0, 1, 2, 4, 8, 9, 16, 18)
_MEDIA = ("pixel_values", "flattened_patches", "input_features", "input_values")

Inputs = dict[str, Tensor]
# Errors that Transformers raises for inputs which a model does not take.
BAD_INPUT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class NoMedia(ValueError):
    """No form of input was found that the model takes and that its logits depend on."""


def image_inputs(model: PreTrainedModel) -> Inputs:
    """Return two rows of text, each with one image.

    Args:
        model: in eval mode.

    Raises:
        NoMedia: its ``forward`` takes no image, or none of the forms known here.
    """
    return _first(model, _beside_text(model, _images(model), IMAGE_TOKENS, "get_image_features"))


def audio_inputs(model: PreTrainedModel) -> Inputs:
    """Return two rows of text, each with one piece of sound; arguments and errors as in :func:`image_inputs`."""
    return _first(model, _beside_text(model, _sounds(model), AUDIO_TOKENS, "get_audio_features"))


def speech_inputs(model: PreTrainedModel) -> Inputs:
    """Return two pieces of sound, with the text of a decoder if there is one; else as :func:`image_inputs`."""
    generator = torch.Generator().manual_seed(1)
    decoder = {"decoder_input_ids": torch.randint(3, 90, (ROWS, 6), generator=generator)}
    return _first(model, iter([sound | decoder for sound in _sounds(model)]))


def padded(inputs: Inputs, padding: str) -> Inputs:
    """Return ``inputs`` with the text of the second row shorter by three tokens: ``"left"``, ``"right"`` or not."""
    if padding == "none":
        return inputs
    mask = inputs["attention_mask"].clone()
    mask[1, slice(0, PADDING) if padding == "left" else slice(mask.shape[1] - PADDING, None)] = 0
    return inputs | {"attention_mask": mask, "input_ids": inputs["input_ids"].masked_fill(mask == 0, 0)}


def _first(model: PreTrainedModel, candidates: Iterator[Inputs]) -> Inputs:
    """The first of ``candidates`` that changes the logits."""
    known = inspect.signature(model.forward).parameters
    reason = ""
    for candidate in candidates:
        inputs = {name: value for name, value in candidate.items() if name in known}
        if not any(name in inputs for name in _MEDIA):
            continue
        try:
            if _depends_on_media(model, inputs):
                return inputs
            reason = reason or "its logits do not depend on them"
        except BAD_INPUT as error:
            reason = reason or " ".join(f"{type(error).__name__}: {error}".split())
    reason = reason or "its forward takes none"
    raise NoMedia(f"{type(model).__name__}: expected inputs of images or sound that it takes, got none: {reason}")


def _beside_text(
    model: PreTrainedModel, candidates: Iterator[Inputs], token_names: tuple[str, ...], features: str
) -> Iterator[Inputs]:
    known = inspect.signature(model.forward).parameters
    for candidate in candidates:
        media = {name: value for name, value in candidate.items() if name in known}
        for count in _counts(model, media, features):
            yield _with_text(model, media, _token(model.config, token_names), count, known)


def _depends_on_media(model: PreTrainedModel, inputs: Inputs) -> bool:
    name = next(name for name in _MEDIA if name in inputs)
    generator = torch.Generator().manual_seed(5)
    others = inputs | {name: torch.randn(inputs[name].shape, generator=generator)}
    with torch.no_grad():
        return not torch.equal(model(**inputs).logits, model(**others).logits)


def _with_text(
    model: PreTrainedModel, media: Inputs, token: int | None, count: int, known: Mapping[str, Any]
) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(3, 90, (ROWS, TEXT_BEFORE), generator=generator)
    after = torch.randint(3, 90, (ROWS, TEXT_AFTER), generator=generator)
    parts = [before, after]
    if count and token is not None:
        around = [getattr(model.config, f"vision_{end}_token_id", None) for end in ("start", "end")]
        begin, end = (before.new_full((ROWS, isinstance(x, int)), x if isinstance(x, int) else 0) for x in around)
        parts = [before, begin, before.new_full((ROWS, count), token), end, after]
    ids = torch.cat(parts, dim=1)
    inputs = media | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in known:
            inputs[name] = (ids == token).long()
    if "cross_attention_mask" in known:
        inputs["cross_attention_mask"] = torch.ones(ROWS, ids.shape[1], 1, TILES, dtype=torch.int64)
    if "decoder_input_ids" in known:
        inputs["decoder_input_ids"] = torch.randint(3, 90, (ROWS, 6), generator=generator)
    return inputs


def _counts(model: PreTrainedModel, media: Inputs, name: str) -> tuple[int, ...]:
    """Return the numbers of tokens that may stand for one image or piece of sound."""
    for module in (model, model.base_model):
        features = getattr(module, name, None)
        if features is None:
            continue
        try:
            takes = inspect.signature(features).parameters
            with torch.no_grad():
                made = features(**{key: value for key, value in media.items() if key in takes})
        except BAD_INPUT:
            return _COUNTS
        pooled = getattr(made, "pooler_output", None)
        return (_rows(getattr(made, "last_hidden_state", made) if pooled is None else pooled) // ROWS,)
    return _COUNTS


def _rows(features: Any) -> int:
    if isinstance(features, Tensor):
        return features.shape[:-1].numel()
    return sum(_rows(part) for part in features)


def _token(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((token for token in found if isinstance(token, int)), None)


def _images(model: PreTrainedModel) -> Iterator[Inputs]:
    """Forms of two images, with whatever says how large they are."""
    generator = torch.Generator().manual_seed(2)
    vision = _vision_config(model.config)
    size = _number(vision, ("image_size", "tile_size"), 16)
    patch = _number(vision, ("patch_size",), 8)
    channels = _number(vision, ("in_channels", "in_chans", "num_channels"), 3)
    frames = _number(vision, ("temporal_patch_size",), 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = torch.tensor([[size, size]] * ROWS)
    known = inspect.signature(model.forward).parameters
    if "image_grid_thw" in known:
        for side in (4, 2):
            grid = torch.tensor([[1, side, side]] * ROWS)
            number = ROWS * side**2
            merge = {"image_merge_sizes": torch.tensor([1] * ROWS)}
            yield {"pixel_values": random(number, channels * frames * patch**2), "image_grid_thw": grid} | merge
            yield {"pixel_values": random(number, channels, patch, patch), "image_grid_thw": grid}
            yield {"pixel_values": random(number, channels * patch**2), "image_grid_thw": grid}
            yield {"pixel_values": random(number, channels, frames, patch, patch), "image_grid_thw": grid}
    if "aspect_ratio_ids" in known:
        yield {
            "pixel_values": random(ROWS, 1, TILES, channels, size, size),
            "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(ROWS, 1, TILES, dtype=torch.int64),
        }
    side = size // patch
    if "spatial_shapes" in known:
        yield {
            "pixel_values": random(ROWS, 16, channels * patch**2),
            "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
            "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.int64),
        }
    if "image_position_ids" in known:
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(ROWS, -1, -1)
        yield {"pixel_values": torch.rand(ROWS, 36, channels * patch**2), "image_position_ids": places}
    if "target_sizes" in known:
        yield {
            "pixel_values": random(1, channels, patch, ROWS * 16 * patch),
            "target_sizes": torch.tensor([[4, 4]] * ROWS),
        }
    if "flattened_patches" in known:
        yield {"flattened_patches": random(ROWS, 4, channels * patch**2 + 2)}
    plain = {"pixel_values": random(ROWS, channels, size, size)}
    yield plain | {"image_sizes": sizes, "pixel_mask": torch.ones(ROWS, size, size, dtype=torch.bool)}
    yield plain
    yield {"pixel_values": random(ROWS, 1, channels, size, size), "image_sizes": sizes}
    yield {"pixel_values": random(ROWS, 2, channels, size, size), "image_sizes": sizes}
    yield {"pixel_values": random(ROWS, 3, channels, size, size), "image_sizes": sizes}
    yield {"pixel_values": random(ROWS, side**2, channels * patch**2)}


def _sounds(model: PreTrainedModel) -> Iterator[Inputs]:
    """Forms of two pieces of sound: waves, and features in either order of bands and frames."""
    generator = torch.Generator().manual_seed(2)
    parts = [model.config, *(getattr(model.config, name, None) for name in ("audio_config", "encoder_config"))]
    bands, positions = 80, 64
    for part in parts:
        bands = _number(part, ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"), bands)
        bands = _number(part, ("input_dim",), bands)
        positions = _number(part, ("max_source_positions", "max_length"), positions)
    known = inspect.signature(model.forward).parameters
    if "input_values" in known:
        yield {"input_values": torch.randn(ROWS, 4000, generator=generator)}
        yield {"input_values": torch.randn(ROWS, positions, bands, generator=generator)}
        yield {"input_values": torch.randn(ROWS, 1, 4000, generator=generator)}
    for frames in (2 * positions, positions, 32):
        for shape in ((bands, frames), (frames, bands)):
            mask = torch.ones(ROWS, frames, dtype=torch.int64)
            masks = dict.fromkeys(("input_features_mask", "feature_attention_mask"), mask)
            features = {"input_features": torch.randn(ROWS, *shape, generator=generator)}
            yield features | masks
            yield features | {name: mask.bool() for name, mask in masks.items()}


def _vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return next((part for name in ("vision_config", "vq_config") if (part := getattr(config, name, None))), config)


def _number(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return otherwise
