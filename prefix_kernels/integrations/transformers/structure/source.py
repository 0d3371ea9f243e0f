"""The things that only the source code of a model's modules tells."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from prefix_kernels.integrations.transformers.structure.key_shape import module_config


def asks_for_attention(module: nn.Module) -> bool:
    """Return True if ``module.forward`` asks Transformers' AttentionInterface for its attention function."""
    return "ALL_ATTENTION_FUNCTIONS" in _source(type(module).forward)


def calls_sdpa(module: nn.Module) -> bool:
    """Return True if ``module.forward`` calls ``scaled_dot_product_attention``."""
    return "scaled_dot_product_attention(" in _source(type(module).forward)


def updates_cache(module: nn.Module) -> bool:
    """Return True if ``module.forward`` adds keys and values to a key/value cache."""
    return bool(re.search(r"\.update\(\s*key", _source(type(module).forward)))


def reads_cache(module: nn.Module) -> bool:
    """Return True if ``module.forward`` may take keys from a cache of self-attentions without adding any."""
    source = _source(type(module).forward)
    reads = bool(re.search(r"\.layers\[self\.layer_idx\]\s*\.keys", source))
    return reads and "cross_attention_cache" not in source


def masks_both_sides(stack: nn.Module) -> bool:
    """Return True if the masks that ``stack.forward`` makes show each token those after it too, by its config."""
    by_config = "create_causal_mask if self.config.is_decoder else create_bidirectional_mask"
    return by_config in _source(type(stack).forward) and not getattr(module_config(stack), "is_decoder", False)


def hands_over_window(module: nn.Module) -> bool:
    """Return False where the mask alone has a sliding window, as attention of this class is not told its size."""
    if "sliding_window" in _source(type(module).forward):
        return True
    return "sliding_window" not in _module_source(type(module).__module__)


def makes_causal_windows(stack: nn.Module) -> bool:
    """Return True if the file of ``stack`` makes causal masks of sliding windows."""
    source = _module_source(type(stack).__module__)
    return "create_sliding_window_causal_mask" in source or "create_masks_for_generate" in source


def is_told_a_smaller_window(module: nn.Module, stack: nn.Module) -> bool:
    """Return True if the masks of ``stack`` show one token more on each side than the window that attention is told.

    Transformers' masks of windows to both sides have all tokens within ``config.sliding_window``, while an attention
    function counts the query's own token too. Most attentions are told one more for it, T5Gemma's is not.
    """
    if getattr(module, "is_causal", True):
        return False
    if "create_bidirectional_sliding_window_mask" not in _module_source(type(stack).__module__):
        return False
    told = getattr(module, "sliding_window", None)
    return told is not None and told == getattr(module_config(module), "sliding_window", None)


def relies_on_causal_mask(module: nn.Module, stack: nn.Module, decodes: bool) -> bool:
    """Return True if causality is in the mask alone: this class passes no ``is_causal``, and its attribute is False.

    Args:
        module: the attention.
        stack: the module that calls its layer.
        decodes: True for a stack that is known to be a decoder; others are where their file makes causal masks only.
    """
    if getattr(module, "is_causal", True) or "is_causal=" in _source(type(module).forward):
        return False
    source = _module_source(type(stack).__module__)
    return "create_causal_mask" in source and (decodes or "create_bidirectional" not in source)


def lays_masks_over(stack: nn.Module) -> bool:
    """Return True if ``stack.forward`` lays a mask function of its own over the masks that Transformers makes."""
    source = _source(type(stack).forward)
    overlay = "use_bidirectional_attention"  # the only ground on which Gemma's text models do so
    if f"if self.config.{overlay}:" in source and not getattr(module_config(stack), overlay, False):
        return False
    return "or_mask_function" in source or "and_mask_function" in source


def hands_on_keywords(layer: nn.Module, attention: nn.Module) -> bool:
    """Return False if ``layer``, its ``attention`` or a module between them keeps keyword arguments to itself."""
    around = [part for part in layer.modules() if attention in part.modules()]
    return all(_hands_on(type(part).forward) for part in around)


@functools.cache
def _hands_on(forward: Callable[..., Any]) -> bool:
    """Return True if ``forward`` makes no call, or one of its calls has ``**kwargs``."""
    tree = ast.parse(textwrap.dedent(_source(forward)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return not calls or any(keyword.arg is None for call in calls for keyword in call.keywords)


@functools.cache
def _source(forward: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):
        return ""


@functools.cache
def _module_source(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (OSError, TypeError, KeyError):
        return ""
