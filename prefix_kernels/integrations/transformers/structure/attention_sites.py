"""The attentions of a Transformers model, and the shape of their keys."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from prefix_kernels.functional import MAX_HEAD_DIM

ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"
SELF = "self"
VISION = "vision"  # the tower of images beside one of text
# The module, in model types that read images beside text, that reads the text. As in PEFT it alone has a prefix: their
# image towers hand no arguments on to their attentions, and do not see which rows the images belong to.
LANGUAGE_MODELS = {"gemma3": "language_model"}


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention that can be given a prefix.

    Attributes:
        module: the module whose ``forward`` asks Transformers for its attention function.
        layer: the repeated layer that contains it.
        stack: the module that owns the list of those layers and calls them.
        role: ``"self"`` in a model of one stack; ``"encoder"``, ``"decoder"`` or ``"cross"`` in an encoder-decoder
            model; the name of the tower (``"text"``, ``"vision"``) in a model of several.
        depth: which of the attentions of its role it is, from 0 on.
        num_kv_heads: ``Hkv``.
        head_dim: ``D``.
        call: which of the calls of ``layer`` in a forward pass it is, from 0 on.
        calls: how often ``stack`` calls ``layer`` in a forward pass: more than once where layers share weights.
    """

    module: nn.Module
    layer: nn.Module
    stack: nn.Module
    role: str
    depth: int
    num_kv_heads: int
    head_dim: int
    call: int = 0
    calls: int = 1


@functools.cache
def _asks_for_attention(forward: Callable[..., Any]) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False


def find_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """All attentions of ``model``, in the order of its modules, or of their calls where layers share weights.

    Those of images are left out where the model reads text beside them (:data:`LANGUAGE_MODELS`).

    Raises:
        ValueError: there are none, one is outside every list of layers, or one has heads that the kernels do not take.
    """
    backbone: nn.Module = model.base_model.get_submodule(LANGUAGE_MODELS.get(model.config.model_type, ""))
    found = {name: module for name, module in backbone.named_modules() if _asks_for_attention(type(module).forward)}
    if not found:
        raise ValueError(f"{type(model).__name__}: found no module that calls Transformers' AttentionInterface")
    sites = []
    for name, module in found.items():
        stack_name, layer = _enclosing_layer(backbone, name)
        stack, role = backbone.get_submodule(stack_name), _role(model, stack_name, name)
        head_dim = _head_dim(module)
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"{type(model).__name__}: {name}: expected a head dim of at most {MAX_HEAD_DIM}, got {head_dim}"
            )
        sites.append(AttentionSite(module, layer, stack, role, 0, _num_kv_heads(module), head_dim))
    depths: Counter[str] = Counter()
    numbered = []
    for site in _in_order_of_calls(sites):
        numbered.append(replace(site, depth=depths[site.role]))
        depths[site.role] += 1
    return numbered


def _in_order_of_calls(sites: list[AttentionSite]) -> list[AttentionSite]:
    """``sites``, those of a layer that is called more than once repeated for each call."""
    stack = sites[0].stack
    groups = getattr(stack, "albert_layer_groups", None)
    if groups is None:
        return sites
    config = module_config(stack)
    repetitions = config.num_hidden_layers / config.num_hidden_groups
    called = [int(i / repetitions) for i in range(config.num_hidden_layers)]
    return [
        replace(site, call=called[:i].count(group), calls=called.count(group))
        for i, group in enumerate(called)
        for site in sites
        if site.layer is groups[group]
    ]


def _enclosing_layer(backbone: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The name of the stack around ``name``, and the layer."""
    parent, parts = backbone, name.split(".")
    for i, part in enumerate(parts):
        child = getattr(parent, part)
        if isinstance(parent, nn.ModuleList):
            return ".".join(parts[: i - 1]), child
        parent = child
    raise ValueError(f"{type(backbone).__name__}: expected {name} inside a ModuleList of layers")


def _role(model: PreTrainedModel, stack_name: str, name: str) -> str:
    if model.config.is_encoder_decoder:
        is_decoder = stack_name.split(".")[-1] == "decoder"
        is_cross = any("encoder_attn" in part or "EncDecAttention" in part for part in name.split("."))
        return CROSS if is_cross else DECODER if is_decoder else ENCODER
    tower = stack_name.split(".")[0]
    return tower.removesuffix("_model") if tower.endswith("_model") else SELF


def module_config(module: nn.Module) -> Any:
    """The config of ``module``; which attributes it has depends on the model type."""
    return module.config


def _num_kv_heads(module: nn.Module) -> int:
    kv_heads: int | None = getattr(module.config, "num_key_value_heads", None)
    if kv_heads is not None:
        return kv_heads
    for attribute in ("num_heads", "n_heads", "num_attention_heads"):
        if isinstance(count := getattr(module, attribute, None), int):
            return count
    heads: int = module_config(module).num_attention_heads
    return heads


def _head_dim(module: nn.Module) -> int:
    for attribute in ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size"):
        if isinstance(size := getattr(module, attribute, None), int):
            return size
    config = module_config(module)
    head_dim: int = config.hidden_size // config.num_attention_heads
    return head_dim
