"""What a prepared model does around its backbone: prefixes go in, positions move, gradients find their way back."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.attention import PREFIX_ARGUMENT, LayerPrefixes, implementation_name
from prefix_kernels.integrations.config import PrefixTuningConfig
from prefix_kernels.integrations.families import find_position_table


class BackboneHook:
    """Forward pre-hook of the backbone: evaluates the prefix encoder once and hands its prefixes to the layers.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, model: PreTrainedModel, config: PrefixTuningConfig, layers: list[nn.Module]) -> None:
        backbone = model.base_model
        self.model = model
        self.layers = layers
        self.implementation = implementation_name(config.attention)
        self.shift = config.num_virtual_tokens if config.position_offset == "peft" else 0
        self.parameter_names = [
            parameter.name
            for parameter in inspect.signature(backbone.forward).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        table = find_position_table(backbone)
        self.num_positions = None if table is None else table.num_embeddings
        # RoBERTa and its relatives number their positions from the padding token's id on, and padding not at all.
        embeddings = getattr(backbone, "embeddings", None)
        self.padding_aware = embeddings if hasattr(embeddings, "create_position_ids_from_input_ids") else None

    def __call__(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        kwargs = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        if backbone.config._attn_implementation != self.implementation:
            raise RuntimeError(
                f"the model's attention implementation is {backbone.config._attn_implementation!r}, which would ignore "
                f"the prefix: expected {self.implementation!r} (remove_prefix(model) takes the prefix off)"
            )
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True: the attention weights are never formed, so they cannot be returned; remove "
                'the prefix and use attn_implementation="eager" to look at them'
            )
        if self.shift:
            self._move_positions(kwargs)
        kwargs[PREFIX_ARGUMENT] = self._prefixes()
        return (), kwargs

    def _prefixes(self) -> LayerPrefixes:
        pairs = self.model.prefix_encoder()
        needs_grad = torch.is_grad_enabled() and pairs[0][0].requires_grad
        if not (needs_grad and any(_is_checkpointed_reentrantly(layer) for layer in self.layers)):
            return LayerPrefixes(pairs)
        # Reentrant checkpointing runs one backward pass per layer. Through the encoder's graph that would be as many
        # passes, the second of which fails: what the first needed has been freed.
        leaves = [tuple(tensor.detach().requires_grad_() for tensor in pair) for pair in pairs]
        return LayerPrefixes(leaves, detached_from=pairs)

    def _move_positions(self, kwargs: dict[str, Any]) -> None:
        input_ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if (input_ids is None) == (embeddings is None):
            return  # the model says what is wrong
        tokens = input_ids if embeddings is None else embeddings
        length, device = tokens.shape[1], tokens.device
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"] + self.shift
        elif self.padding_aware is not None and input_ids is not None:
            pad = self.padding_aware.padding_idx
            positions = self.padding_aware.create_position_ids_from_input_ids(input_ids, pad, past + self.shift)
        else:
            first = 0 if self.padding_aware is None else self.padding_aware.padding_idx + 1
            positions = (torch.arange(length, device=device) + (past + self.shift + first)).unsqueeze(0)
            if torch.compiler.is_compiling() and cache is None and kwargs.get("attention_mask") is None:
                # Under compilation Transformers cannot look at positions to see that no sequences are packed; a
                # padding mask tells it so and saves an Sq x Sk mask.
                kwargs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device)
        if self.num_positions is not None:
            self._check_positions(length, past)
        kwargs["position_ids"] = positions

    def _check_positions(self, length: int, past: int | Tensor) -> None:
        usable = self.num_positions - self.shift
        if self.padding_aware is not None:
            usable -= self.padding_aware.padding_idx + 1
        if isinstance(past, int) and past + length > usable:
            raise ValueError(
                f"input_ids: {past + length} tokens do not fit: position_offset='peft' moves positions by "
                f"{self.shift}, which leaves {usable} of the model's positions; position_offset='none' keeps all"
            )


def _is_checkpointed_reentrantly(layer: nn.Module) -> bool:
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return False
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    # torch's checkpoint is reentrant unless told otherwise.
    return getattr(checkpoint, "keywords", {}).get("use_reentrant", True)


def first_layer_hook(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the first layer: gives detached prefixes a way back to what they were detached from.

    The first layer's input is the last thing whose gradient a backward pass forms, when all layers' prefixes have
    theirs; see :class:`_CollectPrefixGradients`.
    """
    prefixes = kwargs.get(PREFIX_ARGUMENT)
    if prefixes is None or prefixes.detached_from is None:
        return None
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "reentrant activation checkpointing: this version of Transformers runs a layer's hooks inside the "
            "checkpoint, where the gradient of the prefix would be lost; use use_reentrant=False"
        )
    leaves = [tensor for pair in prefixes.pairs for tensor in pair]
    sources = [tensor for pair in prefixes.detached_from for tensor in pair]
    prefixes.detached_from = None
    if args:
        return (_CollectPrefixGradients.apply(args[0], leaves, *sources), *args[1:]), kwargs
    hidden_states = _CollectPrefixGradients.apply(kwargs["hidden_states"], leaves, *sources)
    return args, kwargs | {"hidden_states": hidden_states}


class _CollectPrefixGradients(torch.autograd.Function):
    """The identity on ``hidden_states``; its backward hands the gradients of ``leaves`` to ``sources``."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, leaves: list[Tensor], *sources: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return grad, None, *grads
