"""Where the positions of an encoder-decoder model begin when it has a prefix.

PEFT's prefix lies in the cache of the decoder's self-attention and so moves the positions of the decoder, not those of
the encoder. Decoders look them up where no caller can move them, so the hooks are at their tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from prefix_kernels.integrations.layout import PrefixLayout
from prefix_kernels.integrations.selection import find_selection
from prefix_kernels.integrations.sites import DECODER

if TYPE_CHECKING:
    from prefix_kernels.integrations.tasks import PrefixTasks


class DecoderPositionShift:
    """Forward pre-hook of a decoder's table of positions: lets them begin behind the prefix of the active task.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, table: nn.Embedding, tasks: PrefixTasks) -> None:
        self.tasks = tasks
        self.num_positions = table.num_embeddings - getattr(table, "offset", 0)

    def __call__(self, table: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        shift, positions = self.tasks.shift, kwargs.get("position_ids")
        if positions is None:
            raise RuntimeError(
                f"{type(table).__name__}: expected position_ids as a keyword argument, got none: this version of "
                "Transformers gives position_offset='peft' no way to move positions; use position_offset='none'"
            )
        past = args[1] if len(args) > 1 else kwargs.get("past_key_values_length", 0)
        usable = self.num_positions - shift
        if isinstance(past, int) and past + positions.shape[-1] > usable:
            raise ValueError(
                f"decoder_input_ids: {past + positions.shape[-1]} tokens do not fit: position_offset='peft' moves "
                f"positions by {shift}, which leaves {usable} of the decoder's positions; position_offset='none' keeps "
                "all"
            )
        return args, kwargs | {"position_ids": positions + shift}


class OneShiftForAllRows:
    """Forward pre-hook of a decoder: refuses a batch whose rows may need different positions."""

    def __init__(self, tasks: PrefixTasks) -> None:
        self.tasks = tasks

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if find_selection(kwargs, self.tasks) is not None:
            raise NotImplementedError(
                f"prefix_names: the positions of {type(decoder).__name__} cannot begin elsewhere in each row, which "
                "position_offset='peft' asks for; expected tasks with position_offset='none', or set_prefix"
            )


def register_decoder_shift(layout: PrefixLayout, tasks: PrefixTasks) -> list[RemovableHandle]:
    """Move the positions of the decoder, if its self-attention has a prefix.

    T5 has none to move: there the prefix gets a position bias, see :mod:`prefix_kernels.integrations.position_bias`.
    """
    handles = []
    for decoder in {id(site.stack): site.stack for site in layout.sites if site.role == DECODER}.values():
        table = getattr(decoder, "embed_positions", None)
        if table is not None:
            shift, refusal = DecoderPositionShift(table, tasks), OneShiftForAllRows(tasks)
            handles.append(table.register_forward_pre_hook(shift, with_kwargs=True))
            # Before the decoder's own hook, which takes the names away.
            handles.append(decoder.register_forward_pre_hook(refusal, with_kwargs=True, prepend=True))
    return handles
