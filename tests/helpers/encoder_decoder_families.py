"""T5, flan-T5, BART, mBART and Whisper as `Family`s: tiny random models, their inputs and labels."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import transformers
from family_checks import Family
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

ENCODER_LAYERS, DECODER_LAYERS = 3, 2
VOCABULARY, SOURCE, TARGET = 99, 7, 5
PAD, START, END = 0, 97, 98
TOKENS = {
    **{"vocab_size": VOCABULARY, "pad_token_id": PAD, "decoder_start_token_id": START, "bos_token_id": START},
    **{"eos_token_id": END, "forced_eos_token_id": None, "forced_bos_token_id": None},
}


def tiny_t5(auto_class: type = transformers.AutoModelForSeq2SeqLM, **settings: object) -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "relative_attention_num_buckets": 8}
    sizes |= {"num_layers": ENCODER_LAYERS, "num_decoder_layers": DECODER_LAYERS}
    sizes |= {"relative_attention_max_distance": 12, "initializer_factor": 1.0}
    return auto_class.from_config(AutoConfig.for_model("t5", **(sizes | TOKENS | settings))).eval()


def tiny_flan_t5(**settings: object) -> PreTrainedModel:
    """Gated, with heads that are not as wide together as the model, and an output layer of its own."""
    return tiny_t5(
        feed_forward_proj="gated-gelu", d_kv=6, tie_word_embeddings=False, **({"initializer_factor": 0.5} | settings)
    )


def tiny_bart(
    model_type: str = "bart", auto_class: type = transformers.AutoModelForSeq2SeqLM, **settings: object
) -> PreTrainedModel:
    sizes = {"d_model": 32, "encoder_layers": ENCODER_LAYERS, "decoder_layers": DECODER_LAYERS}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"max_position_embeddings": 32, "init_std": 0.2}
    return auto_class.from_config(AutoConfig.for_model(model_type, **(sizes | TOKENS | settings))).eval()


def tiny_mbart(**settings: object) -> PreTrainedModel:
    return tiny_bart("mbart", **settings)


FRAMES, MELS = 8, 6


def tiny_whisper(**settings: object) -> PreTrainedModel:
    sizes = {"max_source_positions": FRAMES, "max_target_positions": 32, "num_mel_bins": MELS}
    sizes |= {"begin_suppress_tokens": None, "suppress_tokens": None}
    return tiny_bart("whisper", transformers.AutoModelForSpeechSeq2Seq, **(sizes | settings))


def targets(padding: str) -> dict[str, Tensor]:
    """Three decoder inputs; with right padding the second has four tokens and the third three."""
    decoder_input_ids = torch.randint(3, 97, (3, TARGET))
    decoder_input_ids[:, 0] = START
    if padding != "right":
        return {"decoder_input_ids": decoder_input_ids}
    mask = torch.ones_like(decoder_input_ids)
    for row, absent in enumerate([0, 1, 2]):
        mask[row, TARGET - absent :] = 0
    decoder_input_ids[mask == 0] = PAD
    return {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": mask}


def text(padding: str) -> dict[str, Tensor]:
    """Three rows of up to seven tokens; with padding the second has five and the third three."""
    input_ids = torch.randint(3, 97, (3, SOURCE))
    if padding == "none":
        return {"input_ids": input_ids} | targets(padding)
    attention_mask = torch.ones_like(input_ids)
    for row, absent in enumerate([0, 2, 4]):
        attention_mask[row, slice(SOURCE - absent, SOURCE) if padding == "right" else slice(0, absent)] = 0
    input_ids[attention_mask == 0] = PAD
    return {"input_ids": input_ids, "attention_mask": attention_mask} | targets(padding)


def speech(padding: str) -> dict[str, Tensor]:
    """Whisper's encoder takes 30 seconds, always: only its decoder knows padding."""
    return {"input_features": torch.randn(3, MELS, 2 * FRAMES)} | targets(padding)


def next_tokens(inputs: dict[str, Tensor]) -> Tensor:
    labels = torch.randint(3, 97, inputs["decoder_input_ids"].shape)
    return labels.masked_fill(inputs.get("decoder_attention_mask", torch.ones_like(labels)) == 0, -100)


# Small weights are good for small rounding errors; with larger ones a model does not repeat one token.
TALKATIVE = {
    "t5": {"initializer_factor": 1.5, "tie_word_embeddings": False},
    "flan-t5": {"initializer_factor": 1.5},
    "bart": {"init_std": 0.4},
    "mbart": {"init_std": 0.4, "tie_word_embeddings": False},
    "whisper": {"init_std": 0.4},
}
# PEFT gives a prefix to the decoder's self-attention alone, and needs a decoder that is no deeper than the encoder.
PEFT = {"peft_task": "SEQ_2_SEQ_LM"}
T5 = Family("t5", tiny_t5, text, next_tokens, **PEFT)
# PEFT takes the width of the model for that of its heads, and crashes.
FLAN_T5 = Family("flan-t5", tiny_flan_t5, text, next_tokens, **PEFT, peft_settings={"token_dim": 24})
BART = Family("bart", tiny_bart, text, next_tokens, **PEFT)
MBART = Family("mbart", tiny_mbart, text, next_tokens, **PEFT)
# PEFT demands input_ids.
WHISPER = Family("whisper", tiny_whisper, speech, next_tokens, paddings=("none", "right"))
FAMILIES = [T5, FLAN_T5, BART, MBART, WHISPER]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
FAMILIES_AND_PADDINGS = [
    pytest.param(family, padding, id=f"{family.name}-{padding}") for family in FAMILIES for padding in family.paddings
]


def with_model(family: Family, **settings: object) -> Family:
    return dataclasses.replace(family, model=functools.partial(family.model, **settings))


def with_depths(family: Family, encoder: int, decoder: int) -> Family:
    names = ("num_layers", "num_decoder_layers") if "t5" in family.name else ("encoder_layers", "decoder_layers")
    return with_model(family, **dict(zip(names, (encoder, decoder), strict=True)))
