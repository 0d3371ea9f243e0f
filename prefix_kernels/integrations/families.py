"""Which models can be prepared, where their attention is, and what shape its prefixes have."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "gpt2", "llama")
HEAD_NAMES = ("classifier", "score", "qa_outputs")


@dataclass(frozen=True)
class AttentionLayers:
    """The attention of a model.

    Attributes:
        modules: the attention module of each layer, in the order of the layers.
        layers: for each of them, the repeated layer that contains it.
        num_kv_heads: ``Hkv``.
        head_dim: ``D``.
    """

    modules: list[nn.Module]
    layers: list[nn.Module]
    num_kv_heads: int
    head_dim: int


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
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model, which is not supported")
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError(f"{name} has cross-attention, which is not supported (config.add_cross_attention)")
    if model.config.model_type not in FAMILIES:
        raise ValueError(f"{name} is not supported; supported are {', '.join(FAMILIES)}")
    if model.config.output_attentions:
        raise ValueError(
            "model.config.output_attentions=True: the attention weights are never formed, so they cannot be returned"
        )


@functools.cache
def _calls_attention_interface(module_class: type[nn.Module]) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module_class.forward)
    except (OSError, TypeError):
        return False


def find_attention(model: PreTrainedModel) -> AttentionLayers:
    """The attention modules of ``model``: those whose ``forward`` asks Transformers for its attention function.

    Raises:
        ValueError: there are none, one is outside every list of layers, or they differ in shape.
    """
    backbone = model.base_model
    found = {name: module for name, module in backbone.named_modules() if _calls_attention_interface(type(module))}
    if not found:
        raise ValueError(f"{type(model).__name__}: found no module that calls Transformers' AttentionInterface")
    layers = [_enclosing_layer(backbone, name) for name in found]
    shapes = {(_num_kv_heads(module), _head_dim(module)) for module in found.values()}
    if len(shapes) > 1:
        raise ValueError(f"{type(model).__name__}: its layers have keys of different shapes (heads, size): {shapes}")
    ((num_kv_heads, head_dim),) = shapes
    return AttentionLayers(list(found.values()), layers, num_kv_heads, head_dim)


def _enclosing_layer(backbone: nn.Module, name: str) -> nn.Module:
    parent = backbone
    for part in name.split("."):
        child = getattr(parent, part)
        if isinstance(parent, nn.ModuleList):
            return child
        parent = child
    raise ValueError(f"{type(backbone).__name__}: expected {name} inside a ModuleList of layers")


def _num_kv_heads(module: nn.Module) -> int:
    config = module.config
    kv_heads = getattr(config, "num_key_value_heads", None)
    return config.num_attention_heads if kv_heads is None else kv_heads


def _head_dim(module: nn.Module) -> int:
    for attribute in ("head_dim", "attention_head_size"):
        if isinstance(size := getattr(module, attribute, None), int):
            return size
    return module.config.hidden_size // module.config.num_attention_heads


def find_heads(model: PreTrainedModel) -> list[str]:
    """The modules around the backbone that fine-tuning starts at random."""
    return [name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]


def find_position_table(backbone: nn.Module) -> nn.Embedding | None:
    """The learned table of absolute positions, or None for a model without one (rotary, relative)."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in ("position_embeddings", "wpe"):
            return module
    return None
