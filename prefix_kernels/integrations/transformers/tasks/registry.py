"""The tasks of one model: which is active, the modules of the others, and what the rows of a mixed batch see.

A mixed batch is one launch per attention: the prefixes are stacked to a bank ``[N, Hkv, P, D]``, and every row names
its own by index. What users call is in :mod:`prefix_kernels.integrations.transformers.tasks.api`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prefix_kernels import fsdp
from prefix_kernels.checkpoint import marked_heads
from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.runtime.bank import PrefixBank, stack_prefixes
from prefix_kernels.integrations.transformers.runtime.call_context import CallContext
from prefix_kernels.integrations.transformers.runtime.selection import (
    PREFIX_NAMES,
    PrefixSelection,
    RowNames,
    selected,
)
from prefix_kernels.integrations.transformers.storage.labels import Labels
from prefix_kernels.integrations.transformers.storage.stored_task import StoredTask
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout, PrefixPair
from prefix_kernels.integrations.transformers.structure.prepared import config_of, encoder_of, set_config
from prefix_kernels.integrations.transformers.structure.routes import find_layout
from prefix_kernels.integrations.transformers.structure.tensor_parallel import refuse_divided, split_over_heads
from prefix_kernels.integrations.transformers.structure.windows import has_sliding_window
from prefix_kernels.integrations.transformers.tasks.generate import GenerateWithPrefixes
from prefix_kernels.integrations.transformers.tasks.heads import fitted_heads, labels_of_size, refuse_unequal_heads
from prefix_kernels.nn.encoder import PrefixEncoder

FIRST_NAME = "default"
_GENERATE = "generate"
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(eq=False)
class _Task:
    """``encoder``, ``heads`` and ``labels`` are those of an inactive task; the active one's are in the model.

    No heads tell labels apart where ``labels`` is None then. Selections made earlier see by ``was_deleted`` that their
    task is gone.
    """

    config: PrefixTuningConfig
    layout: PrefixLayout
    encoder: PrefixEncoder | nn.ModuleDict | None = None
    heads: dict[str, nn.Module] | None = None
    labels: Labels | None = None
    was_deleted: bool = False

    @property
    def shift(self) -> int:
        return self.config.prefix_lengths()[0] if self.config.position_offset == "peft" else 0


class _OpenCalls(threading.local):
    """The calls of the model that a thread has begun and not ended, with what each has opened."""

    def __init__(self) -> None:
        self.calls: list[ExitStack] = []

    def __reduce__(self) -> tuple[type[_OpenCalls], tuple[()]]:
        return _OpenCalls, ()


class PrefixTasks:
    """The tasks of one model. The active one's modules are in the model; the others' are here, no part of the model.

    Attributes:
        active: the name of the active task.
        context: the selection and the recording that are open around the calls of the model.

    Args:
        takes_names: True for a model that hands keyword arguments on to its layers, as ``prefix_names`` is one.
    """

    def __init__(
        self, model: PreTrainedModel, config: PrefixTuningConfig, layout: PrefixLayout, *, takes_names: bool = True
    ) -> None:
        self.model = model
        self._open_calls = None if takes_names else _OpenCalls()
        self.active = FIRST_NAME
        self.context: CallContext[PrefixSelection] = CallContext()
        self._tasks = {FIRST_NAME: _Task(config, layout)}
        self._shifts_positions = bool(self.shift)

    def install(self) -> list[RemovableHandle]:
        """Let the model take ``prefix_names=``, and return the handles of the hooks that this needs."""
        if self.model.can_generate():
            setattr(self.model, _GENERATE, GenerateWithPrefixes(self.model, self))
        if self._open_calls is not None:
            return [
                self.model.register_forward_pre_hook(self._open_call, with_kwargs=True),
                self.model.register_forward_hook(self._close_call, always_call=True),
            ]
        return [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def uninstall(self) -> None:
        """Undo :meth:`install`, but for the hooks."""
        if self.model.can_generate():
            delattr(self.model, _GENERATE)

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    @property
    def layout(self) -> PrefixLayout:
        """Layout of the prefix of the active task."""
        return self._tasks[self.active].layout

    @property
    def shift(self) -> int:
        """Number of positions by which the active task lets sequences begin later; 0 in a recording."""
        if self.context.recorded is not None:
            return 0
        return self._tasks[self.active].shift

    def check(self, name: object) -> None:
        if name not in self._tasks:
            raise ValueError(f"prefix name: expected one of {self.names}, got {name!r}")

    def encoder(self, name: str) -> PrefixEncoder | nn.ModuleDict:
        encoder = encoder_of(self.model) if name == self.active else self._tasks[name].encoder
        assert encoder is not None, f"the inactive task {name!r} without its prefix"
        return encoder

    def heads(self, name: str) -> dict[str, nn.Module]:
        heads = marked_heads(self.model) if name == self.active else self._tasks[name].heads
        assert heads is not None, f"the inactive task {name!r} without its heads"
        return heads

    def add(self, name: str, stored: StoredTask) -> None:
        """A task with a new prefix, and heads of the stored sizes that are otherwise like those of the active task."""
        self._refuse_fsdp()
        refuse_divided(marked_heads(self.model))
        config, heads = stored.config, marked_heads(self.model)
        if sorted(stored.heads) != sorted(heads):
            raise ValueError(
                f"{name}: expected the heads {sorted(heads)}, as in the model (modules_to_save), got "
                f"{sorted(stored.heads)}"
            )
        layout = find_layout(self.model, config)
        places = [(site.module, site.depth) for site in self.layout.sites]
        if [(site.module, site.depth) for site in layout.sites] != places:
            raise ValueError(
                f"{name}: expected a prefix at the same attentions as the model's first (target_attentions, layers), "
                f"got one at {len(layout.sites)} others where it has {len(places)}"
            )
        windows = config_of(self.model).window_includes_prefix
        if config.window_includes_prefix != windows and has_sliding_window(self.model):
            raise ValueError(f"{name}: expected window_includes_prefix={windows} as in the model, got the opposite")
        if config.position_offset == "peft" and not self._shifts_positions:
            raise ValueError(
                f"{name}: expected position_offset='none' in a model that was prepared with it, got 'peft'; prepare it "
                "with a task of position_offset='peft', beside which those of 'none' keep their positions"
            )
        fitted = fitted_heads(heads, stored.shapes())
        labels = stored.labels
        if labels is None and (ours := Labels.of(self.model)) is not None:
            labels = labels_of_size(heads, fitted, ours)
        device = next(encoder_of(self.model).parameters()).device
        encoder = layout.make_encoder(config, device)
        split_over_heads(self.model, encoder, layout)
        encoder.train(self.model.training)
        self._tasks[name] = _Task(config, layout, encoder, fitted, labels)

    def remove(self, name: str) -> None:
        task = self._tasks.pop(name)
        # A selection keeps the object, but need not keep the memory.
        task.encoder, task.heads, task.was_deleted = None, None, True

    def activate(self, name: str) -> None:
        """Exchange the modules and labels of the active task for those of ``name``."""
        if name == self.active:
            return
        self._refuse_fsdp()
        leaving, entering = self._tasks[self.active], self._tasks[name]
        encoder, heads = self.encoder(self.active), self.heads(self.active)
        new_encoder, new_heads = self.encoder(name), self.heads(name)
        leaving.encoder, leaving.heads, leaving.labels = encoder, heads, Labels.of(self.model)
        self.model.prefix_encoder = _moved_to(encoder, new_encoder).train(self.model.training)
        for head_name, head in new_heads.items():
            parent, _, own_name = head_name.rpartition(".")
            head = _moved_to(heads[head_name], head, cast=True).train(self.model.training)
            setattr(self.model.get_submodule(parent), own_name, head)
        if entering.labels is not None:
            entering.labels.give_to(self.model)
        entering.encoder, entering.heads, entering.labels = None, None, None
        set_config(self.model, entering.config)
        self.active = name

    def _refuse_fsdp(self) -> None:
        if fsdp.units_of(self.model):
            raise ValueError(
                "model: expected one that is not sharded, got one of fully_shard, which keeps the modules that it was "
                "given; load tasks and choose the active one before"
            )

    def pairs(self, stack: nn.Module) -> dict[int, PrefixPair]:
        """The active prefixes of the attentions in ``stack``, by site."""
        return self.layout.pairs(encoder_of(self.model), stack)

    def stack_number(self, stack: nn.Module) -> int:
        return next(number for number, one in enumerate(self.layout.stacks) if one is stack)

    def make_bank(self, names: Sequence[str], stack: nn.Module) -> PrefixBank:
        """The bank of these tasks for ``stack``, as they are now; of no tasks, one with an entry that no row sees."""
        device = next(encoder_of(self.model).parameters()).device
        prefixes = []
        for name in names:
            pairs = self._tasks[name].layout.pairs(self.encoder(name), stack)
            prefixes.append({site: (key.to(device), value.to(device)) for site, (key, value) in pairs.items()})
        if not prefixes:
            prefixes = [{site: (key[:, :1], value[:, :1]) for site, (key, value) in self.pairs(stack).items()}]
        return stack_prefixes(prefixes)

    def make_banks(self, names: Sequence[str]) -> dict[int, PrefixBank]:
        """The bank of these tasks for each stack, to be held: without gradients, but fit for calls that need them."""
        with _ordinary_tensors(), torch.no_grad():
            banks = {number: self.make_bank(names, stack) for number, stack in enumerate(self.layout.stacks)}
        for bank in banks.values():
            bank.let_sizes_vary()
        return banks

    def can_hold_banks(self) -> bool:
        """Return False where FSDP2 shards the model: its parameters are whole only while it runs."""
        return not fsdp.units_of(self.model)

    def select(self, names: Sequence[RowNames], *, for_heads: bool = False) -> PrefixSelection:
        """Select the prefixes of the rows of a batch; ``for_heads`` checks that the active heads suit all of them.

        It holds no banks: each call of the model makes them of the prefixes as they are then.
        """
        rows = self._rows(names)
        used = tuple(dict.fromkeys(name for row in rows for name in row))
        if for_heads:
            self._check_heads(used)
        slots = max([1, *(len(row) for row in rows)])
        ids = [[used.index(name) for name in row] + [-1] * (slots - len(row)) for row in rows]
        shifts = [sum(self._tasks[name].shift for name in row) for row in rows]
        device = next(encoder_of(self.model).parameters()).device
        with _ordinary_tensors():
            return PrefixSelection(
                self,
                used,
                tuple(self._tasks[name] for name in used),
                self._tasks[self.active],
                torch.tensor(ids if slots > 1 else [one for (one,) in ids], dtype=torch.int64, device=device),
                torch.tensor([self._tasks[name].shift for name in used] or [0], dtype=torch.int64, device=device),
                torch.tensor(shifts, dtype=torch.int64, device=device),
                max([0, *shifts]),
                any(shifts),
            )

    def select_for_reuse(self, names: Sequence[RowNames]) -> PrefixSelection:
        """Like :meth:`select` for a call of the model, and holding its banks where no gradients are to reach them."""
        selection = self.select(names, for_heads=True)
        if torch.compiler.is_compiling():
            return selection
        if torch.is_grad_enabled() and not all(self._is_frozen(name) for name in selection.bank_names):
            return selection
        return selection.holding()

    def selection_of(self, names: Sequence[RowNames] | PrefixSelection) -> PrefixSelection:
        """Return the selection that a call of the model with ``prefix_names=names`` means."""
        if not isinstance(names, PrefixSelection):
            return self.select(names, for_heads=True)
        names.refuse_other_owner(self)
        if not torch.compiler.is_compiling() and names.active is not self._tasks[self.active]:
            names.refuse_deleted()
            self._check_heads(names.bank_names)
        return names

    def using(self, names: Sequence[RowNames] | PrefixSelection) -> AbstractContextManager[None]:
        """While it is open, calls of the model in this thread see these prefixes."""
        return selected(replace(self.selection_of(names), rows_may_repeat=True))

    def _rows(self, names: Sequence[RowNames]) -> list[list[str]]:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(
                f"prefix_names: expected a list with a name, a list of names, or None for each row, got {names!r}"
            )
        rows = [[] if row is None else [row] if isinstance(row, str) else list(row) for row in names]
        for row in rows:
            for name in row:
                if name not in self._tasks:
                    raise ValueError(f"prefix_names: expected names among {self.names}, got {name!r}")
        return rows

    def _check_heads(self, names: Sequence[str]) -> None:
        """Raise if the heads of one of the tasks differ from the active ones."""
        ours = self.heads(self.active)
        others = [name for name in names if name != self.active]
        if not ours or not others:
            return
        if torch.compiler.is_compiling():
            raise ValueError(
                "prefix_names: compiled code cannot compare heads; expected the result of select_prefixes(model, names)"
            )
        for name in others:
            refuse_unequal_heads(self.active, ours, name, self.heads(name))

    def _is_frozen(self, name: str) -> bool:
        encoder = self.encoder(name)
        drops = any(isinstance(m, PrefixEncoder) and m.training and m.dropout for m in encoder.modules())
        return not drops and not any(parameter.requires_grad for parameter in encoder.parameters())

    def _open_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let ``prefix_names`` of a call be what its thread sees until the call ends."""
        assert self._open_calls is not None
        # First, because the call is closed also where this raises an error.
        call = ExitStack()
        self._open_calls.calls.append(call)
        names = kwargs.pop(PREFIX_NAMES, None)
        if names is not None:
            call.enter_context(self.context.opened(selection=self.selection_of(names)))
        return args, kwargs

    def _close_call(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        assert self._open_calls is not None
        self._open_calls.calls.pop().close()

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = kwargs.pop(PREFIX_NAMES, None)
        return args, kwargs if names is None else kwargs | {PREFIX_NAMES: self.selection_of(names)}

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        selection = kwargs.get(PREFIX_NAMES)
        if selection is not None and not selection.was_used and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"prefix_names: {type(model).__name__} does not hand it on to its layers; "
                "use use_prefixes(model, names)"
            )


def _moved_to(place: nn.Module, module: _Module, *, cast: bool = False) -> _Module:
    """``module`` on the device of ``place``, with ``cast`` also in its dtype."""
    there, here = next(place.parameters()), next(module.parameters())
    dtype = there.dtype if cast else here.dtype
    # Not where there is nothing to do: DTensor parameters that autograd knows cannot be exchanged.
    return module if (here.device, here.dtype) == (there.device, dtype) else module.to(there.device, dtype)


def _ordinary_tensors() -> AbstractContextManager[object]:
    """While it is open, no inference tensors are made, which a later backward pass could not use.

    It lets gradients be recorded, also where ``torch.no_grad()`` was open around it.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
