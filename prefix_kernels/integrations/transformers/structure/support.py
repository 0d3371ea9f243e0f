"""Supported models, and the heads that are trained beside the prefix."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

# Model types, by kind: encoders of text, decoders, images (and both), decoders that read images beside text.
FAMILIES = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "modernbert"),
    *("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3"),
    *("vit", "deit", "clip", "clip_text_model", "clip_vision_model"),
    "gemma3",
)
ENCODER_DECODERS = ("t5", "bart", "mbart", "whisper")
HEAD_NAMES = (
    *("classifier", "pre_classifier", "sequence_summary", "score", "qa_outputs"),
    *("cls_classifier", "distillation_classifier", "classification_head", "projector"),
)


def refuse_unsupported(model: nn.Module) -> None:
    """Raise for a model that cannot be prepared, naming it and the reason.

    Raises:
        TypeError: not a Transformers model.
        ValueError: a Transformers model without support.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    name = f"{type(model).__name__} (model_type {model.config.model_type!r})"
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{name} cannot take a custom attention function: its code does not go through Transformers' "
            "AttentionInterface"
        )
    if model.config.is_encoder_decoder and model.config.model_type not in ENCODER_DECODERS:
        raise ValueError(
            f"{name} is an encoder-decoder model whose masks, positions and caches are not known here; supported are "
            f"{', '.join(ENCODER_DECODERS)}"
        )
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError(f"{name} has cross-attention, which is not supported (config.add_cross_attention)")
    if not model.config.is_encoder_decoder and any(n.endswith(".encoder_attn") for n, _ in model.named_modules()):
        raise ValueError(f"{name} has cross-attention, which is not supported outside an encoder-decoder model")
    if model.config.model_type not in (*FAMILIES, *ENCODER_DECODERS):
        raise ValueError(f"{name} is not supported; supported are {', '.join((*FAMILIES, *ENCODER_DECODERS))}")
    refuse_attention_weights("model.config.output_attentions", model.config.output_attentions)


def refuse_attention_weights(name: str, wanted: object) -> None:
    """Raise where a setting or argument called ``name`` asks for attention weights.

    Raises:
        ValueError: it does.
    """
    if wanted:
        raise ValueError(
            f"{name}=True: the attention weights are never formed, so they cannot be returned; use the model without a "
            'prefix and attn_implementation="eager" to look at them'
        )


def find_heads(model: PreTrainedModel) -> list[str]:
    """The modules around the backbone that fine-tuning starts at random."""
    return [name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]
