"""The shift of the positions of an encoder-decoder model that has a prefix.

PEFT's prefix lies in the cache of the decoder's self-attention and so moves the positions of the decoder, not those of
the encoder. Decoders look them up where no caller can move them, so the hooks are at their tables; what each row sees
is known to the decoder alone, whose hook leaves it to them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefix_kernels.integrations.transformers.runtime.selection import (
    PREFIX_NAMES,
    PrefixSource,
    batch_size,
    find_selection,
)


class _CurrentShift(threading.local):
    """The shift of the call of a decoder that a thread has begun last, and that asks its table next.

    Attributes:
        shift: by how much its positions begin later, one for all rows or int64 ``[B, 1]``.
        largest: the largest of them.
    """

    shift: int | Tensor = 0
    largest: int = 0

    def __reduce__(self) -> tuple[type[_CurrentShift], tuple[()]]:
        return _CurrentShift, ()


class DecoderShift:
    """Forward pre-hook of a decoder: finds out by how much the positions of this call begin later.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, source: PrefixSource) -> None:
        self.source = source
        self.current = _CurrentShift()

    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        selection = find_selection(kwargs, self.source)
        if selection is None:
            self.current.shift = self.current.largest = self.source.shift
            return None
        if selection.shifts_positions:
            self.current.shift = selection.shifts_of(batch_size(args, kwargs))
            # Code compiled for one largest shift would be compiled again for another; there, the table itself refuses.
            self.current.largest = 0 if torch.compiler.is_compiling() else selection.largest_shift
        else:
            self.current.shift = self.current.largest = 0
        return args, kwargs | {PREFIX_NAMES: selection}


# The argument of a table of positions for the number of earlier tokens, in newer and in older versions.
_PAST_NAMES = ("cache_length", "past_key_values_length")


class PositionTableShift:
    """Forward pre-hook of a decoder's table of positions: lets them begin behind the prefixes of the rows.

    Tables that are not given ``position_ids`` by name number the positions by themselves, from the length of the cache
    on, and may have one row for all: see :class:`RowsOfPositions`.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, table: nn.Embedding, decoder: DecoderShift) -> None:
        self.current = decoder.current
        # Tables of sines grow.
        size = getattr(table, "num_embeddings", None)
        self.num_positions = None if size is None else size - getattr(table, "offset", 0)

    def __call__(
        self, table: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs.get("position_ids")
        if positions is None:
            if isinstance(self.current.shift, Tensor):
                return args, kwargs  # RowsOfPositions looks them up
            return (), _moved(table, args, kwargs, self.current.shift)
        past = args[1] if len(args) > 1 else next((kwargs[name] for name in _PAST_NAMES if name in kwargs), 0)
        usable = None if self.num_positions is None else self.num_positions - self.current.largest
        if usable is not None and isinstance(past, int) and past + positions.shape[-1] > usable:
            raise ValueError(
                f"decoder_input_ids: {past + positions.shape[-1]} tokens do not fit: position_offset='peft' moves "
                f"positions by {self.current.largest}, which leaves {usable} of the decoder's positions; "
                "position_offset='none' keeps all"
            )
        return args, kwargs | {"position_ids": positions + self.current.shift}


class RowsOfPositions:
    """Forward hook of a decoder's table of positions that is not given ``position_ids`` by name.

    Where rows begin at different positions, each row is looked up by itself.
    """

    def __init__(self, decoder: DecoderShift) -> None:
        self.current = decoder.current

    def __call__(
        self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        shift = self.current.shift
        if kwargs.get("position_ids") is not None or not isinstance(shift, Tensor):
            return None
        rows = []
        for row in range(shift.shape[0]):
            given = _moved(table, args, kwargs, shift[row, 0])
            for name in ("input_ids", "inputs_embeds"):
                if given.get(name) is not None:
                    given[name] = given[name][row : row + 1]
            rows.append(table.forward(**given))
        return torch.cat(rows)


def _moved(table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shift: int | Tensor) -> dict[str, Any]:
    """The arguments of a call of ``table``, by name, with positions that begin later by ``shift``.

    Raises:
        RuntimeError: it takes neither positions nor the number of earlier tokens.
    """
    names = list(inspect.signature(table.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    past_name = next((name for name in _PAST_NAMES if name in names), None)
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + shift
    elif past_name is not None:
        given[past_name] = given.get(past_name, 0) + shift
    else:
        raise RuntimeError(
            f"{type(table).__name__}: expected an argument position_ids, {' or '.join(_PAST_NAMES)}, got {names}: this "
            "version of Transformers gives position_offset='peft' no way to move positions; use position_offset='none'"
        )
    return given


def without_row_dimension(
    table: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """Forward hook of a decoder's table of positions: ``[1, B, S, D]`` to ``[B, S, D]``.

    BART's table takes the positions ``[S]`` of one row for all, and puts a dimension of rows before whatever it gets.
    """
    return output.squeeze(0) if output.dim() == 4 else None


def register_decoder_shift(decoders: Iterable[nn.Module], source: PrefixSource) -> list[RemovableHandle]:
    """Move the positions of ``decoders``, the stacks whose self-attention has a prefix.

    T5 has none to move: there the prefix gets a position bias, see
    :mod:`prefix_kernels.integrations.transformers.runtime.relative_bias`.
    """
    handles = []
    for decoder in decoders:
        table = getattr(decoder, "embed_positions", None)
        if table is not None:
            # Before the decoder's own hook, which takes the names away.
            shift = DecoderShift(source)
            handles.append(decoder.register_forward_pre_hook(shift, with_kwargs=True, prepend=True))
            handles.append(table.register_forward_pre_hook(PositionTableShift(table, shift), with_kwargs=True))
            handles.append(table.register_forward_hook(without_row_dimension, with_kwargs=True))
            handles.append(table.register_forward_hook(RowsOfPositions(shift), with_kwargs=True))
    return handles
