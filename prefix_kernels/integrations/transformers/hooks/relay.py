"""A way for prefixes past modules that do not hand on the keyword arguments that they are given."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from prefix_kernels.integrations.transformers.runtime.call_prefixes import (
    PREFIX_ARGUMENT,
    RELAY_ATTRIBUTE,
    PrefixRelay,
)


class TakePrefixes:
    """Forward pre-hook of a layer: keeps the prefixes that it is given for its attentions.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, relay: PrefixRelay) -> None:
        self.relay = relay

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.relay.prefixes = kwargs.get(PREFIX_ARGUMENT)


def register_relay(layer: nn.Module, attention: nn.Module) -> RemovableHandle:
    """Let the attention function find the prefixes that ``layer`` is given when ``attention`` calls it."""
    relay = PrefixRelay()
    setattr(attention, RELAY_ATTRIBUTE, relay)
    return layer.register_forward_pre_hook(TakePrefixes(relay), with_kwargs=True)
