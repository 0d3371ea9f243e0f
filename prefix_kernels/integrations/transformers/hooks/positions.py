"""The shift of the positions of a sequence in a model with a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.runtime.packed_rows import PACKED_ARGUMENT, told_packed_rows
from prefix_kernels.integrations.transformers.runtime.selection import PREFIX_NAMES, PrefixSource, find_selection
from prefix_kernels.integrations.transformers.structure.caches import CACHE_NAMES, past_length

# What models call their learned table of absolute positions.
POSITION_TABLES = ("position_embeddings", "position_embedding", "wpe")


def position_modules(model: PreTrainedModel, stacks: Sequence[nn.Module]) -> dict[nn.Module, nn.Module]:
    """The module that numbers the positions of the sequences that each of ``stacks`` processes, where there is one.

    It is the innermost model around the stack: of CLIP, whose towers can be called alone, the text tower. Models of
    images take no position_ids: they have no sequence that could begin behind the prefix.
    """
    found: dict[nn.Module, nn.Module] = {}
    for stack in stacks:
        owners = [
            module
            for module in model.base_model.modules()
            if isinstance(module, PreTrainedModel) and any(inner is stack for inner in module.modules())
        ]
        if "position_ids" in inspect.signature(owners[-1].forward).parameters:
            found[stack] = owners[-1]
    return found


class PositionShift:
    """Forward pre-hook of the backbone: lets the sequence's positions begin behind the prefix, as they do in PEFT.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, backbone: nn.Module, source: PrefixSource, may_be_packed: bool) -> None:
        self.source = source
        self.may_be_packed = may_be_packed
        self.parameter_names = [
            parameter.name
            for parameter in inspect.signature(backbone.forward).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        table = find_position_table(backbone)
        # OPT's table has rows before the first position, and padding has no positions of its own.
        self.num_positions = None if table is None else table.num_embeddings - getattr(table, "offset", 0)
        self.counts_tokens = table is not None and takes_padding(table)
        # RoBERTa and its relatives number their positions from the padding token's id on, and padding not at all.
        embeddings = getattr(backbone, "embeddings", None)
        self.padding_aware = embeddings if hasattr(embeddings, "create_position_ids_from_input_ids") else None

    def __call__(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        self._move_positions(kwargs)
        return (), kwargs

    def _shift(self, kwargs: dict[str, Any], batch: int, length: int) -> tuple[int | Tensor, int]:
        """The shift, one for all, ``[batch, 1]`` or, of packed sequences, ``[batch, length]``; and the largest."""
        selection = find_selection(kwargs, self.source)
        if selection is None:
            return self.source.shift, self.source.shift
        kwargs[PREFIX_NAMES] = selection
        if not selection.shifts_positions:
            return 0, 0
        # Code compiled for one largest shift would be compiled again for another; there, the table itself refuses.
        largest = 0 if torch.compiler.is_compiling() else selection.largest_shift
        packed = kwargs.get(PACKED_ARGUMENT) or (told_packed_rows(kwargs) if self.may_be_packed else None)
        if packed is None:
            return selection.shifts_of(batch), largest
        return selection.shifts_of(packed.count)[packed.of_tokens(batch, length), 0], largest

    def _move_positions(self, kwargs: dict[str, Any]) -> None:
        input_ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens: Tensor | None = input_ids if embeddings is None else embeddings
        if tokens is None or (input_ids is not None and embeddings is not None):
            return  # the model says what is wrong
        length, device = tokens.shape[1], tokens.device
        shift, largest = self._shift(kwargs, tokens.shape[0], length)
        if isinstance(shift, int) and shift == 0:
            return
        past = past_length(kwargs)
        if kwargs.get("position_ids") is not None:
            positions = self._moved(kwargs["position_ids"], shift)
        elif self.padding_aware is not None and input_ids is not None:
            pad = self.padding_aware.padding_idx
            positions = self.padding_aware.create_position_ids_from_input_ids(input_ids, pad, past + shift)
        elif self.counts_tokens:
            positions = self._moved(count_tokens(kwargs.get("attention_mask"), past, length, device), shift)
        else:
            first = 0 if self.padding_aware is None else self.padding_aware.padding_idx + 1
            positions = torch.arange(length, device=device).unsqueeze(0) + (past + shift + first)
        self._check_positions(length, past, largest)
        kwargs["position_ids"] = positions

    def _moved(self, positions: Tensor, shift: int | Tensor) -> Tensor:
        """``positions``, later by ``shift``; padding that is not counted keeps its -1."""
        return torch.where(positions < 0, positions, positions + shift) if self.counts_tokens else positions + shift

    def _check_positions(self, length: int, past: int | Tensor, shift: int) -> None:
        if self.num_positions is None:
            return
        usable = self.num_positions - shift
        if self.padding_aware is not None:
            usable -= self.padding_aware.padding_idx + 1
        if isinstance(past, int) and past + length > usable:
            raise ValueError(
                f"input_ids: {past + length} tokens do not fit: position_offset='peft' moves positions by "
                f"{shift}, which leaves {usable} of the model's positions; position_offset='none' keeps all"
            )


def find_position_table(backbone: nn.Module) -> nn.Embedding | None:
    """The learned table of absolute positions, or None for a model without one (rotary, relative)."""
    for name, module in backbone.named_modules():
        is_table = name.split(".")[-1] in POSITION_TABLES or takes_padding(module)
        if isinstance(module, nn.Embedding) and is_table:
            return module
    return None


def takes_padding(table: nn.Module) -> bool:
    """Return True if the positions of a table are counted along the padding mask (OPT)."""
    return isinstance(table, nn.Embedding) and "attention_mask" in inspect.signature(table.forward).parameters


def count_tokens(padding: Tensor | None, past: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Positions of tokens that are not padding, from 0 on; padding has -1."""
    if padding is None or padding.dim() != 2:
        return (torch.arange(length, device=device) + past).unsqueeze(0)
    padding = padding.long()
    return (padding.cumsum(1) * padding - 1)[:, past:]


class UnpackedHint:
    """Forward pre-hook of a stack of layers: saves a compiled model a mask of size Sq x Sk.

    Transformers looks at positions to see whether sequences are packed in a row, and while compiling it cannot. A
    padding mask tells it that none are. Positions that the caller gives may be those of packed sequences.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.parameter_names = list(inspect.signature(stack.forward).parameters)
        self.applies = {"attention_mask", "position_ids"} <= set(self.parameter_names) and any(
            name in self.parameter_names for name in CACHE_NAMES
        )

    def __call__(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (self.applies and torch.compiler.is_compiling()):
            return None
        given = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if tokens is None or any(
            given.get(name) is not None for name in ("attention_mask", "position_ids", *CACHE_NAMES)
        ):
            return None
        padding = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return (), given | {"attention_mask": padding}
