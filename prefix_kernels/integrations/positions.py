"""Where the positions of a sequence begin in a model with a prefix."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class PositionShift:
    """Forward pre-hook of the backbone: lets the sequence's positions begin behind the prefix, as they do in PEFT.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, backbone: nn.Module, shift: int) -> None:
        self.shift = shift
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
        self._move_positions(kwargs)
        return (), kwargs

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


def find_position_table(backbone: nn.Module) -> nn.Embedding | None:
    """The learned table of absolute positions, or None for a model without one (rotary, relative)."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in ("position_embeddings", "wpe"):
            return module
    return None
