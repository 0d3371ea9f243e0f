"""Computing once what the rows of a batch have in common at their beginning."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.attention.interface import implementation_name
from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.hooks.attach import (
    give_own_config,
    needs_dense_masks,
    set_implementation,
)
from prefix_kernels.integrations.transformers.hooks.packed import takes_packed_rows
from prefix_kernels.integrations.transformers.hooks.relay import register_relay
from prefix_kernels.integrations.transformers.hooks.shared_rows import ShareRows, hand_out_rows, hand_over_packed
from prefix_kernels.integrations.transformers.rollback import unchanged_on_error
from prefix_kernels.integrations.transformers.runtime.call_prefixes import RELAY_ATTRIBUTE
from prefix_kernels.integrations.transformers.structure.attention_sites import AttentionSite, find_sites
from prefix_kernels.integrations.transformers.structure.prepared import config_of
from prefix_kernels.integrations.transformers.structure.source import hands_on_keywords
from prefix_kernels.integrations.transformers.structure.support import (
    check_transformers_model,
    refuse_fixed_attention,
)
from prefix_kernels.integrations.transformers.structure.windows import (
    WINDOW_ATTRIBUTE,
    has_sliding_window,
    window_of_masks,
)
from prefix_kernels.integrations.transformers.tasks.state import is_prepared, state_of

_STATE = "_shared_rows"


@dataclass(eq=False)
class _SharedRows:
    """The things that :func:`share_prefixes` did to a model.

    Attributes:
        handles: the handles of the hooks.
        attn_implementation: the attention implementation from before; None: it was left as it was.
        attributes: modules and the names of the attributes that they were given.
    """

    handles: list[RemovableHandle]
    attn_implementation: str | None
    attributes: list[tuple[nn.Module, str]]


def share_prefixes(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``model``, in place, compute once the tokens with which the rows of a batch begin alike.

    Rows of a group share their prompt in GRPO, the pair of a preference its question in DPO. Such tokens run through
    the layers once, and every row attends to their keys where they lie. Logits, losses and gradients are those of the
    batch as it is, to rounding: ``last_hidden_state`` keeps its shape ``[B, S, H]``, so heads, losses and trainers need
    no change. Tokens are shared where their ids, their positions and everything before them are equal; padding may be
    on either side. The states of padding are zero.

    A call runs as it is, with a line in the debug log of ``prefix_kernels.share_prefixes``, where it keeps a cache, has
    ``inputs_embeds``, a mask of its own or ``prefix_names``, or where its rows have too little in common; on a GPU,
    with one warning. Dropout inside the layers draws once for shared tokens. A model with a prefix of
    :func:`prefix_kernels.integrations.transformers.get_prefix_model` may be shared too.

    Args:
        model: a decoder whose layers mix tokens by attention alone.

    Returns:
        ``model``. After an error it is as it was before.

    Raises:
        TypeError: ``model`` is not a Transformers model.
        ValueError: it is not supported (the message says why), or shares already.
    """
    check_transformers_model(model)
    if hasattr(model, _STATE):
        raise ValueError(f"{type(model).__name__} shares already; unshare_prefixes(model) ends it")
    sites = _supported_sites(model)
    with unchanged_on_error(model):
        setattr(model, _STATE, _install(model, sites))
    return model


def unshare_prefixes(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`share_prefixes`.

    Raises:
        ValueError: ``model`` does not share.
    """
    shared: _SharedRows | None = getattr(model, _STATE, None)
    if shared is None:
        raise ValueError(f"{type(model).__name__} does not share; share_prefixes(model) lets it")
    for handle in shared.handles:
        handle.remove()
    for module, name in shared.attributes:
        delattr(module, name)
    if shared.attn_implementation is not None and not is_prepared(model):
        set_implementation(model, shared.attn_implementation)
    delattr(model, _STATE)
    return model


def _supported_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """Return the attentions of a model that can share.

    Raises:
        ValueError: it cannot.
    """

    def refuse(why: str) -> ValueError:
        return ValueError(f"{type(model).__name__} (model_type {model.config.model_type!r}) cannot share: {why}")

    refuse_fixed_attention(model)
    if model.config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder model")
    sites = find_sites(model)
    stacks = list(dict.fromkeys(site.stack for site in sites))
    if any(not getattr(site.module, "is_causal", True) for site in sites):
        raise refuse("its attentions see later tokens, which differ")
    if any(site.calls > 1 for site in sites) or len(stacks) > 1:
        raise refuse("its layers are called several times, or are in several stacks")
    config = config_of(model) if is_prepared(model) else PrefixTuningConfig()
    if config.attention != "prefix_kernels":
        raise refuse(f"it was prepared with attention={config.attention!r}")
    if needs_dense_masks(model, config):
        raise refuse("its attentions are not told their windows, or whether they are causal")
    if not takes_packed_rows(stacks[0], sites):
        raise refuse("its layers mix tokens otherwise than by attention, or its masks have a pattern of their own")
    if not {"input_ids", "attention_mask", "position_ids"} <= set(signature(stacks[0].forward).parameters):
        raise refuse(f"{type(stacks[0]).__name__} takes no input_ids, attention_mask and position_ids")
    return sites


def _install(model: PreTrainedModel, sites: list[AttentionSite]) -> _SharedRows:
    stack, share = sites[0].stack, ShareRows(sites[0].stack)
    handles = [stack.register_forward_pre_hook(share, with_kwargs=True, prepend=True)]
    shared = _SharedRows(handles, None, [])
    if is_prepared(model):
        tasks, config = state_of(model).tasks, config_of(model)
        share.context = tasks.context
        share.slides = config.window_includes_prefix and has_sliding_window(model)
    else:
        give_own_config(model)
        shared.attn_implementation = model.config._attn_implementation
        set_implementation(model, implementation_name("prefix_kernels"))
        handles.append(stack.register_forward_pre_hook(hand_over_packed, with_kwargs=True))
        for site in sites:
            if not hands_on_keywords(site.layer, site.module):
                handles.append(register_relay(site.layer, site.module))
                shared.attributes.append((site.module, RELAY_ATTRIBUTE))
            if (window := window_of_masks(site.module, site.stack)) is not None:
                setattr(site.module, WINDOW_ATTRIBUTE, window)
                shared.attributes.append((site.module, WINDOW_ATTRIBUTE))
    handles.append(stack.register_forward_hook(hand_out_rows, with_kwargs=True))
    return shared
