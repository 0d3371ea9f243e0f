"""One call of an attention function by a Transformers module, with arguments that are known to be understood."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.runtime.call_prefixes import CallPrefixes, prefixes_of_call
from prefix_kernels.integrations.transformers.structure.support import refuse_attention_weights
from prefix_kernels.integrations.transformers.structure.windows import WINDOW_ATTRIBUTE

# Arguments that reach an attention function and do not change its result, because something else has applied them
# already or never will: positions (to query and key), packed lengths (to the mask), caches (to key and value), choices
# of what the model returns, the inputs of its loss, and the sizes of images, whose features are in the text already.
HARMLESS_ARGUMENTS = frozenset(
    (
        *("position_ids", "position_embeddings", "cache_position", "position_embeddings_global"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("cache", "past_key_values", "past_key_value", "use_cache", "cache_params"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
        *("num_items_in_batch", "labels", "deterministic", "prefix_names", "image_sizes"),
    )
)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments that Transformers' modules give to their attention function.

    Attributes:
        module: the attention module that calls; it says which prefix to use and whether it is causal.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hkv, Sk, D]`` and ``[B, Hkv, Sk, Dv]``, with what a cache holds, which is never the prefix.
        attention_mask: the result of :func:`prefix_mask`, or a mask of four dimensions given by the user.
        dropout: the probability with which attention weights are zeroed.
        scaling: the factor of the scores. Default: ``D ** -0.5``.
        is_causal: default: the module's own attribute, else True.
        sliding_window: the number of keys that a query sees, itself included, to each side; None: all.
        softcap: the bound of the scores; 0: none.
        sinks: ``[Hq]``, for each head the score of one more key, whose value is zero; None: there is none.
        position_bias: ``[1, Hq, Sq, T]``, added to the scores; None: there is none.
        prefixes: the prefixes of this call of the stack; None: the module was called outside of its stack.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    dropout: float
    scaling: float | None
    is_causal: bool | None
    sliding_window: int | None
    softcap: float
    sinks: Tensor | None
    position_bias: Tensor | None
    prefixes: CallPrefixes | None


_warned_strides: set[type[nn.Module]] = set()


def _dense_rows(module: nn.Module, name: str, states: Tensor) -> Tensor:
    """``states``, or a copy where the elements of a row do not lie one beside the other, as the kernels need them."""
    if states.stride(-1) == 1 or states.shape[-1] == 1:
        return states
    if not torch.compiler.is_compiling() and type(module) not in _warned_strides:
        _warned_strides.add(type(module))
        warnings.warn(
            f"{type(module).__name__}: {name} has stride {states.stride(-1)} in its last dimension, where the kernels "
            "need 1; it is copied in every call",
            stacklevel=2,
        )
    return states.contiguous()


def read_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    arguments: Mapping[str, Any],
) -> AttentionCall:
    """Read a call with these keyword ``arguments``.

    Raises:
        ValueError: attention weights are asked for, or there is an argument that is not known here, which may change
            what the module computes.
    """
    left = dict(arguments)
    refuse_attention_weights("output_attentions", left.get("output_attentions"))
    call = AttentionCall(
        module,
        _dense_rows(module, "query", query),
        _dense_rows(module, "key", key),
        _dense_rows(module, "value", value),
        attention_mask,
        left.pop("dropout", 0.0),
        left.pop("scaling", None),
        left.pop("is_causal", None),
        left.pop("sliding_window", getattr(module, WINDOW_ATTRIBUTE, None)),
        left.pop("softcap", None) or 0.0,
        left.pop("s_aux", None),
        left.pop("position_bias", None),
        prefixes_of_call(module, left),
    )
    for name, argument in left.items():
        if name not in HARMLESS_ARGUMENTS and argument is not None and argument is not False:
            raise ValueError(
                f"{type(module).__name__}: {name}: expected no argument of this name, which may change the result of "
                f"attention in a way that is not known here, got a {type(argument).__name__}"
            )
    return call
