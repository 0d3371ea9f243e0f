"""PEFT's adapters that live in the layers of a model, such as LoRA, beside a prefix."""

from __future__ import annotations

import sys

from torch import nn


def peft_adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that PEFT has put into layers of ``model``."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # a model that has them was made with it
    if tuners is None:
        return []
    return [
        parameter
        for layer in model.modules()
        if isinstance(layer, tuners.BaseTunerLayer)
        for name in layer.adapter_layer_names
        for parameter in _parameters(getattr(layer, name))
    ]


def _parameters(adapters: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [adapters] if isinstance(adapters, nn.Parameter) else list(adapters.parameters())
