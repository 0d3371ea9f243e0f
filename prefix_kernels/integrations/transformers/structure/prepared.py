"""The two attributes that a prepared model has for its users, ``prefix_encoder`` and ``prefix_tuning_config``."""

from __future__ import annotations

from typing import cast

from torch import nn

from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.nn.encoder import PrefixEncoder

_CONFIG = "prefix_tuning_config"


def encoder_of(model: nn.Module) -> PrefixEncoder | nn.ModuleDict:
    """The module that holds the prefixes of the active task."""
    # nn.Module takes any attribute for a tensor or a module.
    return cast("PrefixEncoder | nn.ModuleDict", model.prefix_encoder)


def config_of(model: nn.Module) -> PrefixTuningConfig:
    """The config of the active task."""
    config: PrefixTuningConfig = getattr(model, _CONFIG)
    return config


def set_config(model: nn.Module, config: PrefixTuningConfig) -> None:
    """Make ``config`` that of the active task."""
    setattr(model, _CONFIG, config)
