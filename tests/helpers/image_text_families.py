"""Gemma 3, which reads images beside text, as `Family`s: a tiny random model, its inputs and labels."""

from __future__ import annotations

import torch
from family_checks import Family
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

PAD, IMAGE, LENGTH, WINDOW = 0, 90, 12, 4
IMAGE_TOKENS = slice(1, 5)  # of the tokens that are no padding


def tiny_gemma3() -> Gemma3ForConditionalGeneration:
    text = {
        **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8},
        **{"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        **{"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64},
    }
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": 16, "patch_size": 4, "vision_use_head": False},
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        initializer_range=0.3,
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=91,
        eoi_token_id=92,
        # With a head of its own a random model does not repeat its last token.
        tie_word_embeddings=False,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.suppress_tokens = [IMAGE]  # for which there would be no image
    return model


def text(padding: str) -> dict[str, Tensor]:
    """Three rows of up to twelve tokens; with ``padding`` the second has nine and the third six."""
    input_ids = torch.randint(3, IMAGE, (3, LENGTH))
    if padding == "none":
        return {"input_ids": input_ids}
    attention_mask = torch.ones_like(input_ids)
    for row, absent in enumerate([0, 3, 6]):
        attention_mask[row, slice(LENGTH - absent, LENGTH) if padding == "right" else slice(0, absent)] = 0
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, PAD), "attention_mask": attention_mask}


def text_with_images(padding: str) -> dict[str, Tensor]:
    """The same with an image in each row, whose tokens see each other."""
    inputs = text(padding)
    valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    place = valid.cumsum(1) * valid - 1
    is_image = (place >= IMAGE_TOKENS.start) & (place < IMAGE_TOKENS.stop)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(is_image, IMAGE)
    return inputs | {"token_type_ids": is_image.long(), "pixel_values": torch.randn(3, 3, 16, 16)}


def labels(inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    # What comes first is predicted by padding on its left, where no model's output means anything.
    ignored = (mask == 0) | (mask.cumsum(1) == 1) | (inputs["input_ids"] == IMAGE)
    return inputs["input_ids"].masked_fill(ignored, -100)


TEXT = Family("text", tiny_gemma3, text, labels, peft_task="CAUSAL_LM", learning_rate=0.3)
IMAGES = Family("images", tiny_gemma3, text_with_images, labels, learning_rate=0.3)
