"""Sliding windows of a model, as its config tells them."""

from __future__ import annotations

from transformers import PreTrainedModel


def has_sliding_window(model: PreTrainedModel) -> bool:
    """Return True if some layers see only a window of the sequence."""
    config = model.config.get_text_config()
    if layer_types := getattr(config, "layer_types", None):
        return "sliding_attention" in layer_types
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        return True
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    return bool(window) and getattr(config, "use_sliding_window", True)
