"""Many tasks on one frozen model: prefixes by name, one of them active, and batches whose rows see different ones.

    model = load_prefix_model(base, "sst2.safetensors")          # the first is called "default"
    load_named_prefix(model, "qnli", "qnli.safetensors")
    set_prefix(model, "qnli")                                    # prefix and heads
    model.generate(**inputs, prefix_names=["qnli", ["default", "qnli"], None])

A mixed batch is one launch per attention: the prefixes are stacked to a bank ``[N, Hkv, P, D]``, and every row names
its own by index.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prefix_kernels.checkpoint import marked_heads
from prefix_kernels.encoder import PrefixEncoder
from prefix_kernels.integrations.config import PrefixTuningConfig
from prefix_kernels.integrations.layout import PrefixLayout, PrefixPair
from prefix_kernels.integrations.recording import find_recording
from prefix_kernels.integrations.selection import (
    PREFIX_NAMES,
    PrefixBank,
    PrefixSelection,
    RowNames,
    selected,
    stack_prefixes,
)
from prefix_kernels.integrations.sites import find_sites
from prefix_kernels.integrations.stored import read_stored_task
from prefix_kernels.integrations.tensor_parallel import split_over_heads

FIRST_NAME = "default"
_TASKS = "_prefix_tasks"


def load_named_prefix(
    model: PreTrainedModel,
    name: str,
    path: str | os.PathLike,
    *,
    config: PrefixTuningConfig | None = None,
    is_trainable: bool = False,
) -> None:
    """Load a further task, stored by ``save_prefix_model`` or by PEFT, beside those that ``model`` has.

    The prefix that ``model`` was prepared with is called "default". Which one is active does not change. The length of
    the new prefix may differ from those of the others, and its ``position_offset`` may be ``"none"`` where theirs is
    ``"peft"``.

    Args:
        model: a model prepared by ``get_prefix_model`` or ``load_prefix_model``.
        name: what :func:`set_prefix` and ``prefix_names=`` call it.
        path: the stored file, or the folder of a PEFT adapter; see ``load_prefix_model``.
        config: default: the stored one.
        is_trainable: let gradients reach its prefix and heads. An inactive task is not among ``model.parameters()``;
            :func:`get_named_prefix` gives its encoder.

    Raises:
        ValueError: the name is taken; the file does not fit the model; the task has prefixes at other attentions or
            other heads than the model's, or treats sliding windows otherwise.
    """
    tasks = tasks_of(model)
    if not isinstance(name, str) or name in tasks.names:
        raise ValueError(f"name: expected a string other than {tasks.names}, got {name!r}")
    task = read_stored_task(path, model, config)
    tasks.add(name, task.config)
    active = tasks.active
    try:
        tasks.activate(name)
        task.load_into(model)
        for module in (model.prefix_encoder, *marked_heads(model).values()):
            module.requires_grad_(is_trainable)
    except Exception:
        tasks.activate(active)
        tasks.remove(name)
        raise
    tasks.activate(active)


def set_prefix(model: PreTrainedModel, name: str) -> None:
    """Make the task ``name`` the active one: ``model.prefix_encoder``, its config, and its heads.

    The modules of the others are kept as they are, outside ``model.parameters()`` and its state dict; so an optimizer
    has to be made anew. ``save_prefix_model`` stores the active task.

    Raises:
        ValueError: there is no such task.
    """
    tasks = tasks_of(model)
    tasks.check(name)
    tasks.activate(name)


def prefix_names(model: PreTrainedModel) -> list[str]:
    """The names of the tasks that ``model`` has, in the order in which they were loaded."""
    return tasks_of(model).names


def active_prefix(model: PreTrainedModel) -> str:
    """The name of the active task."""
    return tasks_of(model).active


def get_named_prefix(model: PreTrainedModel, name: str) -> PrefixEncoder | nn.ModuleDict:
    """The module that holds the prefix of a task, active or not."""
    tasks = tasks_of(model)
    tasks.check(name)
    return tasks.encoder(name)


def delete_named_prefix(model: PreTrainedModel, name: str) -> None:
    """Forget a task.

    Raises:
        ValueError: there is no such task, or it is the active one.
    """
    tasks = tasks_of(model)
    tasks.check(name)
    if name == tasks.active:
        raise ValueError(f"name: expected a task that is not active, got {name!r}; set_prefix to another first")
    tasks.remove(name)


def select_prefixes(model: PreTrainedModel, names: Sequence[RowNames]) -> PrefixSelection:
    """What ``prefix_names=names`` means to ``model``, to be given in its place.

    Good for calls that are repeated, and for compiled ones: another list of names compiles the model anew, another
    selection does not. Made without gradients, or of frozen prefixes alone, it holds them as they are now.

    Args:
        names: for each row of the batch the name of a task, several names, seen one after another, or None.

    Raises:
        ValueError: there is no such task, or the heads of the tasks differ from those of the active one.
    """
    return tasks_of(model).select(names, for_heads=True)


@contextmanager
def use_prefixes(model: PreTrainedModel, names: Sequence[RowNames] | PrefixSelection) -> Iterator[None]:
    """While it is open, calls of ``model`` in this thread see these prefixes as if they were given ``prefix_names=``.

    For code that calls the model and cannot be given an argument. A batch may have ``n`` rows for each entry, one
    after another, as beams are laid out.
    """
    selection = names if isinstance(names, PrefixSelection) else select_prefixes(model, names)
    with selected(replace(selection, may_repeat=True)):
        yield


def tasks_of(model: nn.Module) -> PrefixTasks:
    """The tasks of a prepared model.

    Raises:
        ValueError: it has no prefix.
    """
    if not hasattr(model, _TASKS):
        raise ValueError(f"model: expected a model prepared by get_prefix_model, got a plain {type(model).__name__}")
    return getattr(model, _TASKS)


@dataclass(eq=False)
class _Task:
    """``encoder`` and ``heads`` are those of an inactive task; the active one's are in the model."""

    config: PrefixTuningConfig
    layout: PrefixLayout
    encoder: nn.Module | None = None
    heads: dict[str, nn.Module] | None = None

    @property
    def shift(self) -> int:
        return self.config.prefix_lengths()[0] if self.config.position_offset == "peft" else 0


class PrefixTasks:
    """The tasks of one model. The active one's modules are in the model; the others' are here, no part of the model.

    Attributes:
        active: the name of the active task.
        open_selections: how many selections and recordings are open in all threads.
    """

    def __init__(self, model: PreTrainedModel, config: PrefixTuningConfig, layout: PrefixLayout) -> None:
        self.model = model
        self.active = FIRST_NAME
        self.open_selections = 0
        self._tasks = {FIRST_NAME: _Task(config, layout)}
        self._shifts_positions = bool(self.shift)
        self._kept: tuple[tuple[str, ...], list[tuple[Tensor, int]], dict[int, PrefixBank]] | None = None

    def install(self) -> list[RemovableHandle]:
        """Let the model take ``prefix_names=``; the hooks that it needs."""
        setattr(self.model, _TASKS, self)
        if self.model.can_generate():
            self.model.generate = GenerateWithPrefixes(self.model)
        return [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def uninstall(self) -> None:
        """Undo :meth:`install`, but for the hooks."""
        delattr(self.model, _TASKS)
        if self.model.can_generate():
            del self.model.generate

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "open_selections": 0}

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    @property
    def layout(self) -> PrefixLayout:
        """Of the active task."""
        return self._tasks[self.active].layout

    @property
    def shift(self) -> int:
        """By how much the active task moves positions."""
        if find_recording(self) is not None:
            return 0
        return self._tasks[self.active].shift

    def check(self, name: object) -> None:
        if name not in self._tasks:
            raise ValueError(f"prefix name: expected one of {self.names}, got {name!r}")

    def encoder(self, name: str) -> nn.Module:
        return self.model.prefix_encoder if name == self.active else self._tasks[name].encoder

    def heads(self, name: str) -> dict[str, nn.Module]:
        return marked_heads(self.model) if name == self.active else self._tasks[name].heads

    def add(self, name: str, config: PrefixTuningConfig) -> None:
        """A task with a new prefix and copies of the active task's heads."""
        layout = PrefixLayout(find_sites(self.model), config)
        ours = [(site.module, site.depth) for site in self.layout.sites]
        if [(site.module, site.depth) for site in layout.sites] != ours:
            raise ValueError(
                f"{name}: expected a prefix at the same attentions as the model's first (target_attentions, layers), "
                f"got one at {len(layout.sites)} others where it has {len(ours)}"
            )
        windows = self.model.prefix_tuning_config.window_includes_prefix
        if config.window_includes_prefix != windows and _has_windows(self.model):
            raise ValueError(f"{name}: expected window_includes_prefix={windows} as in the model, got the opposite")
        if config.position_offset == "peft" and not self._shifts_positions:
            raise ValueError(
                f"{name}: expected position_offset='none' in a model that was prepared with it, got 'peft'; prepare it "
                "with a task of position_offset='peft', beside which those of 'none' keep their positions"
            )
        device = next(self.model.prefix_encoder.parameters()).device
        encoder = layout.make_encoder(config, device)
        split_over_heads(self.model, encoder, layout)
        encoder.train(self.model.training)
        self._tasks[name] = _Task(config, layout, encoder, copy.deepcopy(marked_heads(self.model)))

    def remove(self, name: str) -> None:
        del self._tasks[name]
        self._kept = None

    def activate(self, name: str) -> None:
        """Exchange the modules of the active task for those of ``name``."""
        if name == self.active:
            return
        leaving, entering = self._tasks[self.active], self._tasks[name]
        leaving.encoder, leaving.heads = self.model.prefix_encoder, marked_heads(self.model)
        self.model.prefix_encoder = _moved_to(leaving.encoder, entering.encoder).train(self.model.training)
        for head_name, head in entering.heads.items():
            parent, _, own_name = head_name.rpartition(".")
            head = _moved_to(leaving.heads[head_name], head, cast=True).train(self.model.training)
            setattr(self.model.get_submodule(parent), own_name, head)
        entering.encoder, entering.heads = None, None
        self.model.prefix_tuning_config = entering.config
        self.active = name

    def pairs(self, stack: nn.Module) -> dict[int, PrefixPair]:
        """The active prefixes of the attentions in ``stack``, by site."""
        return self.layout.pairs(self.model.prefix_encoder, stack)

    def stack_number(self, stack: nn.Module) -> int:
        return next(number for number, one in enumerate(self.layout.stacks) if one is stack)

    def make_bank(self, names: Sequence[str], stack: nn.Module) -> PrefixBank:
        """The bank of these tasks for ``stack``, as they are now."""
        device = next(self.model.prefix_encoder.parameters()).device
        prefixes = []
        for name in names:
            pairs = self._tasks[name].layout.pairs(self.encoder(name), stack)
            prefixes.append({site: (key.to(device), value.to(device)) for site, (key, value) in pairs.items()})
        return stack_prefixes(prefixes)

    def select(self, names: Sequence[RowNames], *, for_heads: bool = False) -> PrefixSelection:
        """What the rows of a batch see; with ``for_heads`` it is checked that the active heads suit all of them."""
        rows = self._rows(names)
        used = list(dict.fromkeys(name for row in rows for name in row))
        if for_heads:
            self._check_heads(used)
        frozen = [] if torch.compiler.is_compiling() else [name for name in self._tasks if self._is_frozen(name)]
        # All that are frozen, so that other names find the same bank; or else no more than what is seen.
        keeps = bool(frozen) and all(name in frozen for name in used)
        bank_names = tuple(frozen if keeps else used or [self.active])
        banks = None
        if keeps:
            banks = self._kept_banks(bank_names)
        elif not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            banks = self._make_banks(bank_names)

        slots = max([0, *(len(row) for row in rows)])
        ids = [[bank_names.index(name) for name in row] + [-1] * (max(slots, 1) - len(row)) for row in rows]
        shifts = [sum(self._tasks[name].shift for name in row) for row in rows]
        device = next(self.model.prefix_encoder.parameters()).device
        return PrefixSelection(
            self,
            bank_names,
            torch.tensor(ids if slots > 1 else [one for (one,) in ids], dtype=torch.int64, device=device),
            torch.tensor(shifts, dtype=torch.int64, device=device),
            max([0, *shifts]),
            any(shifts),
            banks=banks,
        )

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
            for head_name, head in self.heads(name).items():
                state = ours[head_name].state_dict()
                if any(not torch.equal(state[key], tensor.to(state[key])) for key, tensor in head.state_dict().items()):
                    raise ValueError(
                        f"prefix_names: {name!r} has another {head_name!r} than the active task {self.active!r}, and a "
                        f"batch passes through one: expected tasks with equal heads; set_prefix(model, {name!r}) "
                        "switches them for a batch of its own"
                    )

    def _is_frozen(self, name: str) -> bool:
        encoder = self.encoder(name)
        drops = any(isinstance(m, PrefixEncoder) and m.training and m.dropout for m in encoder.modules())
        return not drops and not any(parameter.requires_grad for parameter in encoder.parameters())

    def _make_banks(self, names: Sequence[str]) -> dict[int, PrefixBank]:
        return {number: self.make_bank(names, stack) for number, stack in enumerate(self.layout.stacks)}

    def _kept_banks(self, names: tuple[str, ...]) -> dict[int, PrefixBank]:
        """The banks of frozen tasks, made again only if one of the prefixes was written to or moved."""
        tensors = [x for name in names for x in (*self.encoder(name).parameters(), *self.encoder(name).buffers())]
        state = [(x.detach(), _version(x)) for x in tensors]
        if self._kept is None or self._kept[0] != names or not _same_state(self._kept[1], state):
            with torch.no_grad():
                self._kept = names, state, self._make_banks(names)
        return self._kept[2]

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = kwargs.pop(PREFIX_NAMES, None)
        if isinstance(names, PrefixSelection) and names.owner is not self:
            raise ValueError("prefix_names: expected a selection made for this model, got one made for another")
        if names is not None and not isinstance(names, PrefixSelection):
            names = self.select(names, for_heads=True)
        return args, kwargs if names is None else kwargs | {PREFIX_NAMES: names}

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        selection = kwargs.get(PREFIX_NAMES)
        if selection is not None and not selection.was_used and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"prefix_names: {type(model).__name__} does not hand it on to its layers; "
                "use use_prefixes(model, names)"
            )


class GenerateWithPrefixes:
    """``model.generate`` with one more argument, ``prefix_names=``; an object, so that it can be copied and pickled.

    Each row's prefix serves all its beams and returned sequences.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, *args: Any, prefix_names: Sequence[RowNames] | None = None, **kwargs: Any) -> Any:
        generate = type(self.model).generate
        if prefix_names is None:
            return generate(self.model, *args, **kwargs)
        with torch.no_grad(), use_prefixes(self.model, prefix_names):
            return generate(self.model, *args, **kwargs)


def _moved_to(place: nn.Module, module: nn.Module, *, cast: bool = False) -> nn.Module:
    """``module`` on the device of ``place``, with ``cast`` also in its dtype."""
    there, here = next(place.parameters()), next(module.parameters())
    dtype = there.dtype if cast else here.dtype
    # Not where there is nothing to do: DTensor parameters that autograd knows cannot be exchanged.
    return module if (here.device, here.dtype) == (there.device, dtype) else module.to(there.device, dtype)


def _has_windows(model: PreTrainedModel) -> bool:
    """Whether a layer may attend within a sliding window."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) is not None for name in ("sliding_window", "local_attention"))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same_state(one: list[tuple[Tensor, int]], other: list[tuple[Tensor, int]]) -> bool:
    return len(one) == len(other) and all(
        a.data_ptr() == b.data_ptr() and a.device == b.device and a.dtype == b.dtype and version == other_version
        for (a, version), (b, other_version) in zip(one, other, strict=True)
    )
