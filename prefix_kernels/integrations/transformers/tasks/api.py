"""Many tasks on one frozen model: prefixes by name, one of them active, and batches whose rows see different ones.

    model = load_prefix_model(base, "sst2.safetensors")          # the first is called "default"
    load_named_prefix(model, "qnli", "qnli.safetensors")
    set_prefix(model, "qnli")                                    # prefix, heads and their labels
    model.generate(**inputs, prefix_names=["qnli", ["default", "qnli"], None])

What the model keeps of them is in :mod:`prefix_kernels.integrations.transformers.tasks.registry`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn
from transformers import PreTrainedModel

from prefix_kernels.checkpoint import marked_heads
from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.runtime.selection import PrefixSelection, RowNames
from prefix_kernels.integrations.transformers.storage.stored_task import read_stored_task
from prefix_kernels.integrations.transformers.tasks.state import tasks_of
from prefix_kernels.nn.encoder import PrefixEncoder


def load_named_prefix(
    model: PreTrainedModel,
    name: str,
    path: str | os.PathLike[str],
    *,
    config: PrefixTuningConfig | None = None,
    is_trainable: bool = False,
) -> None:
    """Load a further task, stored by ``save_prefix_model`` or by PEFT, beside those that ``model`` has.

    The prefix that ``model`` was prepared with is called "default". Which one is active does not change. The length of
    the new prefix may differ from those of the others, and its ``position_offset`` may be ``"none"`` where theirs is
    ``"peft"``. So may the number of its labels: its heads then have linear layers with other numbers of outputs.

    Args:
        model: a model prepared by ``get_prefix_model`` or ``load_prefix_model``.
        name: what :func:`set_prefix` and ``prefix_names=`` call it.
        path: the stored file, or the folder of a PEFT adapter; see ``load_prefix_model``.
        config: default: the stored one.
        is_trainable: let gradients reach its prefix and heads. An inactive task is not among ``model.parameters()``,
            so that DistributedDataParallel does not sum its gradients; :func:`get_named_prefix` gives its encoder.

    Raises:
        ValueError: the name is taken; the file does not fit the model; the task has prefixes or heads at other places
            than the model's, or treats sliding windows otherwise; the model is sharded by FSDP2 already, or tensor
            parallelism divides one of its heads.
    """
    tasks = tasks_of(model)
    if not isinstance(name, str) or name in tasks.names:
        raise ValueError(f"name: expected a string other than {tasks.names}, got {name!r}")
    task = read_stored_task(path, model, config)
    tasks.add(name, task)
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
    """Make the task ``name`` the active one: ``model.prefix_encoder``, its config, its heads, and their labels.

    With the labels go ``id2label``, ``label2id``, ``num_labels`` and ``problem_type`` of the model's config, from which
    it forms its loss.

    The modules of the others are kept as they are, outside ``model.parameters()`` and its state dict; so an optimizer
    has to be made anew. ``save_prefix_model`` stores the active task.

    Raises:
        ValueError: there is no such task, or the model is sharded by FSDP2.
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
    """Forget a task. Selections that name it are refused from then on, also once another is loaded under its name.

    Raises:
        ValueError: there is no such task, or it is the active one.
    """
    tasks = tasks_of(model)
    tasks.check(name)
    if name == tasks.active:
        raise ValueError(f"name: expected a task that is not active, got {name!r}; set_prefix to another first")
    tasks.remove(name)


def select_prefixes(model: PreTrainedModel, names: Sequence[RowNames]) -> PrefixSelection:
    """Make a selection of prefixes, to be given as ``prefix_names=`` in place of the names.

    All rows pass through the heads of the active task, also those that see no prefix or that of another task; so heads
    that differ, in size or in values, are refused. The model below its head (``model.base_model``) takes
    ``prefix_names=`` whatever the heads.

    Made without gradients, or of frozen prefixes alone, a selection holds a bank of the prefixes that ``names`` has, as
    they are now, padded to the longest of them: what is written to them later takes a new selection, and gradients do
    not reach them. (Not where FSDP2 shards the model.) Given a list of names instead, every call of the model stacks
    that bank anew, and ``generate`` once for all tokens; so a selection saves time where calls are repeated.

    Compiled code should be given selections: it is compiled anew for another list of names, but not for another
    selection, save that a bank of one task and banks of several are compiled apart.

    Args:
        names: for each row of the batch the name of a task, several names, seen one after another, or None.

    Raises:
        ValueError: there is no such task, or the heads of the tasks differ from those of the active one. A
            later call raises it too if one of the tasks was deleted, or the one that is active then has other heads;
            compiled code does not look.
    """
    return tasks_of(model).select_for_reuse(names)


def use_prefixes(model: PreTrainedModel, names: Sequence[RowNames] | PrefixSelection) -> AbstractContextManager[None]:
    """While it is open, calls of ``model`` in this thread see these prefixes as if they were given ``prefix_names=``.

    For code that calls the model and cannot be given an argument. A batch may have ``n`` rows for each entry, one
    after another, as beams are laid out; ``generate``, which lays them out itself, wants one entry for each row of its
    inputs here too.
    """
    return tasks_of(model).using(names)
