"""The attentions of a Transformers model, and the shape of their keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.structure.caches import cache_layer
from prefix_kernels.integrations.transformers.structure.key_shape import key_shape, module_config
from prefix_kernels.integrations.transformers.structure.source import asks_for_attention
from prefix_kernels.integrations.transformers.structure.support import advice_for

ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"
SELF = "self"
VISION = "vision"  # the tower of images beside one of text
# Names in the config of a model that reads images or sound beside text: the token that stands for them.
_MEDIA_TOKENS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
# Parts of the name of a module that attends to the states of an encoder.
_CROSS_NAMES = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention")


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
        value_head_dim: ``Dv``.
        call: which of the calls of ``layer`` in a forward pass it is, from 0 on.
        calls: how often ``stack`` calls ``layer`` in a forward pass: more than once where layers share weights.
        cache_layer: the number of the cache's layer that has its keys; None: it names none.
    """

    module: nn.Module
    layer: nn.Module
    stack: nn.Module
    role: str
    depth: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    call: int = 0
    calls: int = 1
    cache_layer: int | None = None


def find_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """All attentions of ``model``, in the order of its modules, or of their calls where layers share weights.

    A model that reads images or sound beside text has them in its language model alone, as in PEFT: its other towers
    hand no arguments on to their attentions, and do not see which rows their inputs belong to. A decoder that can
    attend to an encoder has them at its self-attention alone.

    Raises:
        ValueError: there are none, one is outside every list of layers, or one has heads that the kernels do not take.
    """
    backbone = language_model(model.base_model)
    found = {name: module for name, module in backbone.named_modules() if asks_for_attention(module)}
    if not model.config.is_encoder_decoder:
        found = {name: module for name, module in found.items() if not is_cross(name)}
    if not found:
        raise ValueError(
            f"{type(model).__name__}: found no module that calls Transformers' AttentionInterface{advice_for(model)}"
        )
    sites = []
    for name, module in found.items():
        stack_name, layer = enclosing_layer(backbone, name)
        stack, role = backbone.get_submodule(stack_name), _role(model, stack_name, name)
        if role == SELF:
            _refuse_other_input(model, backbone, stack, name)
        shape = key_shape(module, f"{type(model).__name__}: {name}")
        layer_number = cache_layer(module, found.values())
        sites.append(AttentionSite(module, layer, stack, role, 0, *shape, cache_layer=layer_number))
    depths: Counter[str] = Counter()
    numbered = []
    for site in _in_order_of_calls(sites):
        numbered.append(replace(site, depth=depths[site.role]))
        depths[site.role] += 1
    return numbered


def _refuse_other_input(model: PreTrainedModel, backbone: nn.Module, stack: nn.Module, name: str) -> None:
    """Raise where ``stack`` is in a part of ``model`` that reads something else than the model, as an image."""
    around = [part for part in backbone.modules() if isinstance(part, PreTrainedModel) and stack in part.modules()]
    if around and around[-1].main_input_name != model.main_input_name:
        raise ValueError(
            f"{type(model).__name__}: expected attentions to {model.main_input_name} that call Transformers' "
            f"AttentionInterface, found only {name}, of {around[-1].main_input_name}"
        )


def language_model(backbone: nn.Module) -> nn.Module:
    """Return the submodule that reads text, in a backbone of several towers, else ``backbone`` itself."""
    reads_media = any(getattr(module_config(backbone), name, None) is not None for name in _MEDIA_TOKENS)
    for name in ("language_model", "text_model") if reads_media else ("language_model",):
        if isinstance(part := getattr(backbone, name, None), nn.Module):
            return part
    return backbone


def is_cross(name: str) -> bool:
    """Return True if the module called ``name`` is in an attention to the states of an encoder."""
    return any(cross in part for part in name.split(".") for cross in _CROSS_NAMES)


def _in_order_of_calls(sites: list[AttentionSite]) -> list[AttentionSite]:
    """Return ``sites`` in order of calls, each site of a layer that is called n times repeated n times."""
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


def enclosing_layer(backbone: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the name of the stack around the module ``name``, and its layer."""
    parent, parts = backbone, name.split(".")
    for i, part in enumerate(parts):
        child = getattr(parent, part)
        if isinstance(parent, nn.ModuleList):
            return ".".join(parts[: i - 1]), child
        parent = child
    raise ValueError(f"{type(backbone).__name__}: expected {name} inside a ModuleList of layers")


def _role(model: PreTrainedModel, stack_name: str, name: str) -> str:
    if model.config.is_encoder_decoder:
        *around, last = stack_name.split(".")
        if last not in (ENCODER, DECODER) or {ENCODER, DECODER} <= {last, *around}:
            raise ValueError(
                f"{type(model).__name__}: expected an encoder-decoder model whose layers are those of a module "
                f"'encoder' or 'decoder', got {name}"
            )
        return CROSS if is_cross(name) else last
    tower = stack_name.split(".")[0]
    return tower.removesuffix("_model") if tower.endswith("_model") else SELF
