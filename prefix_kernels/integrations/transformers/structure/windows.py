"""Sliding windows of a model, as its config tells them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.structure.key_shape import module_config
from prefix_kernels.integrations.transformers.structure.source import (
    hands_over_window,
    makes_causal_windows,
)

# Set on attention modules whose class does not hand its sliding window over: its size.
WINDOW_ATTRIBUTE = "prefix_window"


def has_sliding_window(model: PreTrainedModel) -> bool:
    """Return True if some layers see only a window of the sequence."""
    config = model.config.get_text_config()
    if layer_types := getattr(config, "layer_types", None):
        return "sliding_attention" in layer_types
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        return True
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    return bool(window) and getattr(config, "use_sliding_window", True)


def window_of_masks(module: nn.Module, stack: nn.Module) -> int | None:
    """Return the size of the window that the masks of ``stack`` have for the causal attention ``module``.

    None: they have none, or a config that names the kind of each layer leaves open which; or the module hands over the
    size by itself.
    """
    config = module_config(module)
    window = getattr(config, "sliding_window", None)
    if hands_over_window(module) or not makes_causal_windows(stack) or getattr(config, "layer_types", None):
        return None
    return window if isinstance(window, int) and getattr(module, "is_causal", False) else None
