"""Selections: the prefix that each row of a batch sees when they differ, as indices into a bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.runtime.bank import PrefixBank
from prefix_kernels.integrations.transformers.runtime.call_context import CallContext
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout, PrefixPair

# The keyword argument of a prepared model's forward and generate.
PREFIX_NAMES = "prefix_names"
RowNames = str | None | Sequence[str]


class NamedTask(Protocol):
    """A task as a selection remembers it."""

    was_deleted: bool


class PrefixSource(Protocol):
    """The owner of the prefixes that the hooks of a model hand to its attentions.

    The tasks of a prepared model are one, the adapters of an accelerated PEFT model another.

    Attributes:
        context: the selection and the recording that are open around the calls of its model.
    """

    context: CallContext[PrefixSelection]

    @property
    def layout(self) -> PrefixLayout:
        """The attentions that have a prefix now."""

    @property
    def shift(self) -> int:
        """The number of positions by which sequences begin later in a call without a selection."""

    @property
    def names(self) -> list[str]:
        """The names that a selection may have."""

    def pairs(self, stack: nn.Module) -> dict[int, PrefixPair]:
        """Return the prefixes ``[Hkv, P, D]`` in a call without a selection, of the attentions in ``stack`` by site."""

    def select(self, names: Sequence[RowNames]) -> PrefixSelection:
        """Return the selection that a call with ``prefix_names=names`` means."""

    def stack_number(self, stack: nn.Module) -> int:
        """Return the key of ``stack`` in the result of :meth:`make_banks`."""

    def make_bank(self, names: Sequence[str], stack: nn.Module) -> PrefixBank:
        """Return the bank of the named tasks for the attentions in ``stack``; gradients reach the prefixes."""

    def make_banks(self, names: Sequence[str]) -> dict[int, PrefixBank]:
        """Return the bank of the named tasks for each stack, without gradients, to be held."""

    def can_hold_banks(self) -> bool:
        """Return False where prefixes are whole only while the model runs, as FSDP2 keeps them."""


@dataclass(eq=False)
class PrefixSelection:
    """The prefixes of a batch; made by :func:`prefix_kernels.integrations.transformers.tasks.api.select_prefixes`.

    Attributes:
        owner: the source of the prefixes, which it was made by.
        bank_names: the tasks in the bank, in its order: those that a row names, and no others.
        bank_tasks: the tasks that ``owner`` had under these names.
        active: the task whose heads were compared with theirs.
        ids: int64 ``[B]`` or ``[B, M]``, indices into the bank; -1 is none.
        bank_shifts: int64 ``[N]``, by how much each prefix of the bank lets positions begin later: its length, or 0.
        shifts: int64 ``[B]``, by how much the positions of each row begin later (``position_offset="peft"``).
        largest_shift: the largest of them.
        shifts_positions: True where that is more than 0.
        rows_may_repeat: True where a batch may have ``n`` rows for each entry, one after another, as beams are laid
            out.
        row_count_checked: True after ``generate`` has compared the number of entries with the rows of its inputs.
        banks: the bank of each stack if the selection holds them; otherwise each forward pass makes its own from the
            prefixes as they are then, and gradients reach them.
        was_used: True after a stack has asked for its bank.
    """

    owner: PrefixSource
    bank_names: tuple[str, ...]
    bank_tasks: tuple[NamedTask, ...]
    active: NamedTask
    ids: Tensor
    bank_shifts: Tensor
    shifts: Tensor
    largest_shift: int
    shifts_positions: bool
    rows_may_repeat: bool = False
    row_count_checked: bool = False
    banks: dict[int, PrefixBank] | None = None
    was_used: bool = field(default=False, init=False)

    def bank(self, stack: nn.Module) -> PrefixBank:
        """The bank of the attentions in ``stack``.

        Raises:
            ValueError: one of the tasks was deleted. Compiled code does not see it where the selection holds its banks.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.was_used = True
        # Compiled code that looked at the names would be compiled anew for others.
        if self.banks is None or not compiling:
            self.refuse_deleted()
        if self.banks is not None:
            return self.banks[self.owner.stack_number(stack)]
        return self.owner.make_bank(self.bank_names, stack)

    def holding(self) -> PrefixSelection:
        """Return this selection holding its banks, made from the prefixes as they are now; no gradients reach them.

        Not where FSDP2 shards the model: its parameters are there only while it runs.
        """
        if self.banks is not None or not self.owner.can_hold_banks():
            return self
        self.refuse_deleted()
        torch._dynamo.maybe_mark_dynamic(self.bank_shifts, 0)
        return replace(self, banks=self.owner.make_banks(self.bank_names))

    def refuse_deleted(self) -> None:
        """Raise where a task of the selection was deleted, or its name given to another.

        Raises:
            ValueError: the message names it.
        """
        for name, task in zip(self.bank_names, self.bank_tasks, strict=True):
            if task.was_deleted:
                replaced = "; its name is that of another task by now" if name in self.owner.names else ""
                raise ValueError(
                    f"prefix_names: expected a selection of tasks that the model still has, got one with {name!r}, "
                    f"which was deleted after the selection was made{replaced}: make a new selection by "
                    f"select_prefixes(model, names), of tasks among {self.owner.names}"
                )

    def refuse_other_owner(self, owner: PrefixSource) -> None:
        """Raise where this selection was made for another model than that of ``owner``.

        Raises:
            ValueError: it was.
        """
        if self.owner is not owner:
            raise ValueError("prefix_names: expected a selection made for this model, got one made for another")

    def for_rows(self, count: int) -> PrefixSelection:
        """Return this selection for ``count`` rows of inputs of ``generate``, which may expand each to several.

        Raises:
            ValueError: there is not one entry for each row.
        """
        if not self.row_count_checked and count != self.ids.shape[0]:
            raise ValueError(
                f"prefix_names: expected one entry for each of the {count} rows of generate's inputs, got "
                f"{self.ids.shape[0]}; beams and returned sequences need no entries of their own"
            )
        return replace(self, rows_may_repeat=True, row_count_checked=True)

    def ids_of(self, batch: int) -> Tensor:
        """``ids`` for a batch of that many rows."""
        return self._repeated(self.ids, batch)

    def shifts_of(self, batch: int) -> Tensor:
        """``shifts`` for a batch of that many rows, ``[batch, 1]``."""
        return self._repeated(self.shifts, batch).unsqueeze(1)

    def for_any_rows(self) -> PrefixSelection:
        """Return this selection for any number of rows; all its rows must see the same prefixes.

        Raises:
            ValueError: they do not.
        """
        if (self.ids != self.ids[:1]).any():
            raise ValueError(
                "prefix_names: expected the same for all rows where generate goes on with some of them when others are "
                "done (Whisper: speech longer than one segment, or several temperatures), got different ones; generate "
                "from one row, or from rows of one task, at a time"
            )
        return replace(self, ids=self.ids[:1], shifts=self.shifts[:1])

    def _repeated(self, rows: Tensor, batch: int) -> Tensor:
        count = rows.shape[0]
        if batch == count:
            return rows
        if self.rows_may_repeat and count and batch % count == 0:
            return rows.repeat_interleave(batch // count, dim=0)
        expected = "one entry for each, or for each equal group," if self.rows_may_repeat else "one entry for each"
        raise ValueError(f"prefix_names: expected {expected} of the {batch} rows of the batch, got {count}")


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of rows of a call of a stack of layers."""
    names = ("hidden_states", "inputs_embeds", "input_ids", "input_features", "pixel_values")
    candidates = [*args, *(kwargs.get(name) for name in names)]
    return next(candidate.shape[0] for candidate in candidates if isinstance(candidate, Tensor))


def selected(selection: PrefixSelection) -> AbstractContextManager[None]:
    """While it is open, ``selection`` is what the calls of its model in this thread see, unless they name their own."""
    return selection.owner.context.opened(selection=selection)


def find_selection(kwargs: Mapping[str, Any], owner: PrefixSource) -> PrefixSelection | None:
    """Find the selection of a call with ``kwargs``: the one that it names, else the open one, else None."""
    named = kwargs.get(PREFIX_NAMES)
    if isinstance(named, PrefixSelection):
        named.refuse_other_owner(owner)
        return named
    if named is not None:
        return owner.select(named)
    return owner.context.selection
