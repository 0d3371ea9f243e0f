"""Models that cannot be prepared, and the heads that are trained beside the prefix."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.structure.source import calls_sdpa

# Model types whose attentions go through the interface and yet would be wrong, and why.
REFUSED_TYPES = {
    "diffllama": "its attention function gets values of other heads than those that it projects and caches",
    "doge": "it trains the masks that its attention function gets",
    "evolla": "one of its prefixes would lie in its protein encoder, which need not run",
    "jetmoe": "its attention function gets a copy of each key for every expert",
    "hrm_text": "it calls its stacks several times in each forward pass",
}
# The same for model types whose decoders alone are right.
REFUSED_ENCODER_DECODERS = {
    "bigbird_pegasus": "its encoder computes attention by itself, and misreads masks made for other functions",
    "longt5": "its encoder computes attention by itself",
}
HEAD_NAMES = (
    *("classifier", "pre_classifier", "sequence_summary", "score", "qa_outputs"),
    *("cls_classifier", "distillation_classifier", "classification_head", "projector"),
)


def check_transformers_model(model: nn.Module) -> None:
    """Check that ``model`` is a Transformers model.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")


def refuse_fixed_attention(model: PreTrainedModel) -> None:
    """Raise for a model whose attention function cannot be replaced.

    Raises:
        ValueError: the message names the model and the reason.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{_described(model)} cannot take a custom attention function: its code does not go through Transformers' "
            f"AttentionInterface{advice_for(model)}"
        )
    refused = REFUSED_TYPES | (REFUSED_ENCODER_DECODERS if model.config.is_encoder_decoder else {})
    if model.config.model_type in refused:
        raise ValueError(f"{_described(model)} is not supported: {refused[model.config.model_type]}")
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            f"{_described(model)} has cross-attention, which is not supported (config.add_cross_attention)"
        )


def advice_for(model: PreTrainedModel) -> str:
    """Return the end of an error message: the function that helps a ``model`` built on PyTorch's attention; or ""."""
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return (
            "; its attentions are torch.nn.MultiheadAttention: prefix_kernels.replace_multihead_attention(model) gives "
            "them a prefix"
        )
    callers = [type(module).__name__ for module in model.modules() if calls_sdpa(module)]
    if callers:
        return (
            f"; {callers[0]} calls F.scaled_dot_product_attention itself: prefix_kernels.prefix_attention takes the "
            "same arguments, and a prefix"
        )
    return ""


def _described(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


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
