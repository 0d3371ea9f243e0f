"""The state of a prepared model: one object, in one attribute of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.structure.quantized import mark_as_quantized
from prefix_kernels.integrations.transformers.tasks.registry import PrefixTasks

_STATE = "_prefix_state"


class InstalledHooks(Protocol):
    """The hooks that give a model's attentions their prefixes."""

    def remove(self, model: PreTrainedModel) -> None:
        """Take them off."""


@dataclass(eq=False)
class PrefixState:
    """The things that a prepared model has beside ``prefix_encoder`` and ``prefix_tuning_config``.

    Attributes:
        tasks: its tasks, and what is open around its calls.
        task_handles: the handles of the hooks by which the model takes ``prefix_names=``.
        prefix_hooks: the hooks that give its attentions their prefixes.
        trained: which of its parameters, by name, required gradients before.
        was_quantized: ``model.is_quantized`` was True before, and is not for as long as the model has a prefix.
    """

    tasks: PrefixTasks
    task_handles: list[RemovableHandle]
    prefix_hooks: InstalledHooks
    trained: dict[str, bool]
    was_quantized: bool

    def install(self, model: PreTrainedModel) -> None:
        """Make it the state of ``model``."""
        setattr(model, _STATE, self)

    def remove(self, model: PreTrainedModel) -> None:
        """Take the hooks and the state off ``model``, or off the copy of the model that this is a copy with."""
        for handle in self.task_handles:
            handle.remove()
        self.tasks.uninstall()
        self.prefix_hooks.remove(model)
        if self.was_quantized:
            mark_as_quantized(model)
        delattr(model, _STATE)


def is_prepared(model: nn.Module) -> bool:
    """Return True if ``model`` has a prefix of ``get_prefix_model``."""
    return hasattr(model, _STATE)


def state_of(model: nn.Module) -> PrefixState:
    """Return the state of a prepared model.

    Raises:
        ValueError: it has no prefix.
    """
    if not is_prepared(model):
        raise ValueError(f"model: expected a model prepared by get_prefix_model, got a plain {type(model).__name__}")
    state: PrefixState = getattr(model, _STATE)
    return state


def tasks_of(model: nn.Module) -> PrefixTasks:
    """Return the tasks of a prepared model.

    Raises:
        ValueError: it has no prefix.
    """
    return state_of(model).tasks
