"""A model that a failed preparation leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_Container = dict[Any, Any] | set[Any]
# An object, its attributes, and the containers among them with what they held.
_State = tuple[object, dict[str, Any], list[tuple[_Container, _Container]]]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Take back what the block did to ``model`` if it raises.

    Taken back are attributes, submodules, parameters, buffers and hooks of all modules, which parameters are trained,
    and the attributes of configs. The values of tensors are not: they have to be written last, by what cannot fail
    half-way.
    """
    modules = list(model.modules())
    states = [_state(one) for one in [*modules, *_configs(modules)]]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for state in states:
            _restore(state)
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        raise


def _state(one: object) -> _State:
    attributes = dict(vars(one))
    return one, attributes, [(x, copy.copy(x)) for x in attributes.values() if isinstance(x, dict | set)]


def _restore(state: _State) -> None:
    one, attributes, containers = state
    vars(one).clear()
    vars(one).update(attributes)
    # In place, as the handles of hooks refer to them.
    for container, content in containers:
        container.clear()
        container.update(content)


def _configs(modules: list[nn.Module]) -> list[PreTrainedConfig]:
    """The configs of ``modules`` and those inside them, each once."""
    found: dict[int, PreTrainedConfig] = {}
    waiting: list[object] = list(modules)
    while waiting:
        for value in vars(waiting.pop()).values():
            if isinstance(value, PreTrainedConfig) and id(value) not in found:
                found[id(value)] = value
                waiting.append(value)
    return list(found.values())
