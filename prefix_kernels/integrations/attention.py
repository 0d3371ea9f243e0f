"""The attention functions and the mask function that Transformers calls by name.

They are registered, under the names in :data:`prefix_kernels.integrations.config.ATTENTIONS`, with Transformers'
``AttentionInterface`` and ``AttentionMaskInterface``. The prefixes of a forward pass travel as the keyword argument
:data:`PREFIX_ARGUMENT` from the backbone through every layer to the attention function. So they belong to that one
call: nothing is left behind by an exception, shared between threads or missing when activation checkpointing runs a
layer again during the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prefix_kernels.functional import prefix_attention
from prefix_kernels.integrations.layout import PrefixPair
from prefix_kernels.integrations.position_bias import StackBias, biased_mask, position_bias_of

PREFIX_ARGUMENT = "layer_prefixes"
# Set on every attention module with a prefix: its index in PrefixLayout.sites.
PREFIX_SITE_ATTRIBUTE = "prefix_site"


@dataclass(eq=False)
class LayerPrefixes:
    """The prefixes of a stack of layers for one call of it.

    Attributes:
        pairs: ``(prefix_key, prefix_value)`` of each attention by its index among the sites: ``[Hkv, P, D]``, or with
            ``ids`` a bank ``[N, Hkv, P, D]``. Empty: the call has no prefixes.
        window_includes_prefix: of :class:`prefix_kernels.integrations.config.PrefixTuningConfig`.
        ids: ``[B]`` or ``[B, M]``, the prefixes of the bank that each row sees; -1 is none.
        lens: the valid lengths ``[N]`` of each attention's bank, by its index among the sites.
        detached_from: what ``pairs`` were detached from, until their gradients have been given a way back (see
            :func:`prefix_kernels.integrations.hooks.first_layer_hook`); otherwise None.
        bias: the stack's position bias, where it has one.
        sites: in a layer that is called more than once, the sites of its attentions in this call by those of their
            first calls; an attention that is missing has no prefix in this call. None elsewhere.
        inputs: what such layers were called with so far; see :mod:`prefix_kernels.integrations.repeated`.
        recorded: gets the keys and values ``[B, Hkv, Sk, D]`` of the sequence, by site; None: they are not asked for.
    """

    pairs: dict[int, PrefixPair]
    window_includes_prefix: bool = False
    ids: Tensor | None = None
    lens: dict[int, Tensor] | None = None
    detached_from: dict[int, PrefixPair] | None = None
    bias: StackBias | None = None
    sites: dict[int, int] | None = None
    inputs: dict[int, list[StorageWeakRef | None]] = field(default_factory=dict)
    recorded: dict[int, PrefixPair] | None = None

    def site_of(self, module: nn.Module) -> int | None:
        """The index of the attention ``module``, in this call of it, among the sites; None: it has no prefix."""
        return self.called_site(module) if self.pairs else None

    def called_site(self, module: nn.Module) -> int | None:
        """The same, whether or not this call has prefixes."""
        site = getattr(module, PREFIX_SITE_ATTRIBUTE, None)
        return site if self.sites is None else self.sites.get(site)


def _prefix_of(module: nn.Module, prefixes: LayerPrefixes | None) -> PrefixPair | tuple[None, None]:
    site = getattr(module, PREFIX_SITE_ATTRIBUTE, None)
    if site is None:
        return None, None
    if prefixes is None:
        raise RuntimeError(
            f"{type(module).__name__} of prefix {site} was called without its prefix: call the model itself or its "
            "backbone, not a single layer. If you did, this model does not hand keyword arguments on to its attention"
        )
    if prefixes.detached_from is not None:
        raise RuntimeError(
            f"{type(module).__name__} of prefix {site} ran before the first layer was called: reentrant activation "
            "checkpointing would lose the gradient of the prefix; use use_reentrant=False"
        )
    site = prefixes.site_of(module)
    if site is None:
        return None, None
    key, value = prefixes.pairs[site]
    if not torch.is_grad_enabled() and key.requires_grad and key.grad_fn is not None:
        raise RuntimeError(
            f"{type(module).__name__} of prefix {site} runs without gradients in a forward pass that needs them: "
            "reentrant activation checkpointing that get_prefix_model does not know of would lose the gradient of the "
            "prefix; use use_reentrant=False, or torch's checkpoint_wrapper before get_prefix_model"
        )
    return key, value


def _record(module: nn.Module, key: Tensor, value: Tensor, prefixes: LayerPrefixes | None) -> None:
    if prefixes is not None and prefixes.recorded is not None and (site := prefixes.called_site(module)) is not None:
        prefixes.recorded[site] = key, value


def _rows_of(module: nn.Module, prefixes: LayerPrefixes | None) -> tuple[Tensor | None, Tensor | None]:
    """``(prefix_ids, prefix_lens)`` of a mixed batch, or None for both."""
    site = None if prefixes is None or prefixes.ids is None else prefixes.site_of(module)
    return (None, None) if site is None else (prefixes.ids, prefixes.lens[site])


class _Visibility(NamedTuple):
    """What a call sees, as :func:`prefix_kernels.prefix_attention` takes it."""

    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    window_size: tuple[int, int]
    query_offset: Tensor | None = None


def _visibility(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    prefixes: LayerPrefixes | None,
) -> _Visibility:
    if attention_mask is not None and attention_mask.dim() == 4:
        # A mask of four dimensions says everything about the sequence: it is the caller's own, or `prefix_mask` built
        # it to.
        slides = prefixes is not None and prefixes.window_includes_prefix and prefixes.site_of(module) is not None
        if sliding_window is None or not slides:
            return _Visibility(key, value, attention_mask, False, (-1, -1))
        offset = _position_of_the_query(module, query, attention_mask)
        return _Visibility(key, value, attention_mask, False, (sliding_window - 1, -1), offset)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    if attention_mask is None:
        return _Visibility(key, value, None, causal, window)
    # The mask ends with the last query. A static cache has room for more keys behind it; a sliding cache has dropped
    # the first ones.
    end = attention_mask.shape[1]
    key, value = key[:, :, :end], value[:, :, :end]
    padding = attention_mask[:, end - key.shape[2] :]
    return _Visibility(key, value, padding[:, None, None, :], causal, window)


def _position_of_the_query(module: nn.Module, query: Tensor, mask: Tensor) -> Tensor:
    """Where the only query stands among the keys, by row: at the last one that it sees.

    Raises:
        NotImplementedError: there are more queries, or the mask is not boolean.
    """
    if query.shape[2] != 1 or mask.dtype != torch.bool:
        raise NotImplementedError(
            f"{type(module).__name__}: window_includes_prefix=True: a mask of four dimensions (packed sequences, or "
            "one given as attention_mask) does not say how much of the prefix is inside the window; give a padding "
            "mask [B, Sk], or use window_includes_prefix=False"
        )
    column = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask[:, 0, 0], column, 0).amax(-1)
    return last.expand(query.shape[0])


def _with_position_bias(
    module: nn.Module,
    visible: Tensor | None,
    attention_mask: Tensor | None,
    k_len: int,
    prefixes: LayerPrefixes | None,
    arguments: dict[str, object],
) -> Tensor | None:
    """``visible``, or with a position bias the mask of both, which may have columns for the prefix."""
    bias = position_bias_of(module, arguments)
    if bias is None:
        return visible
    if prefixes is None or prefixes.bias is None:
        return biased_mask(bias, visible, k_len)
    has_prefix = prefixes.site_of(module) is not None
    if has_prefix and prefixes.bias.prefix is not None and prefixes.ids is not None:
        raise NotImplementedError(
            f"{type(module).__name__}: a prefix for each row has no position bias with position_offset='peft', because "
            "they differ in length; use position_offset='none'"
        )
    return prefixes.bias.mask(bias, attention_mask, visible, k_len, has_prefix)


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layer_prefixes: LayerPrefixes | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Transformers' attention function, by :func:`prefix_kernels.prefix_attention`.

    Args:
        module: the attention module that calls; it says which layer's prefix to use and whether it is causal.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hkv, Sk, D]``, including what a cache holds, which is never the prefix.
        attention_mask: what :func:`prefix_mask` returned, or a mask of four dimensions given by the user.

    Returns:
        The output ``[B, Sq, Hq, D]``, and None for the attention weights, which the kernels never form.
    """
    _refuse(module, kwargs)
    prefix_key, prefix_value = _prefix_of(module, layer_prefixes)
    prefix_ids, prefix_lens = _rows_of(module, layer_prefixes)
    _record(module, key, value, layer_prefixes)
    seen = _visibility(module, query, key, value, attention_mask, is_causal, sliding_window, layer_prefixes)
    out = prefix_attention(
        query,
        seen.key,
        seen.value,
        prefix_key,
        prefix_value,
        attn_mask=_with_position_bias(
            module, seen.attn_mask, attention_mask, seen.key.shape[2], layer_prefixes, kwargs
        ),
        dropout_p=dropout,
        is_causal=seen.is_causal,
        scale=scaling,
        prefix_ids=prefix_ids,
        prefix_lens=prefix_lens,
        window_size=seen.window_size,
        query_offset=seen.query_offset,
        softcap=softcap or 0.0,
        window_includes_prefix=layer_prefixes is not None and layer_prefixes.window_includes_prefix,
    )
    return out.transpose(1, 2), None


def torch_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layer_prefixes: LayerPrefixes | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The baseline: the same as :func:`prefix_attention_forward` by ``torch.cat`` and SDPA.

    The prefix is converted to the query's dtype and repeated for every row of the batch, as PEFT does. The mask stays
    ``[B, 1, 1, P + Sk]`` where attention is not causal.
    """
    _refuse(module, kwargs)
    if softcap:
        raise ValueError(
            'attention="torch": scaled_dot_product_attention has no softcap; use attention="prefix_kernels"'
        )
    _record(module, key, value, layer_prefixes)
    key, value, mask, causal, (left, right), offset = _visibility(
        module, query, key, value, attention_mask, is_causal, sliding_window, layer_prefixes
    )
    q_len, k_len = query.shape[2], key.shape[2]
    offset = k_len - q_len if offset is None else offset[:, None, None, None]
    position = torch.arange(q_len, device=query.device)[:, None] + offset
    if (causal and q_len > 1) or left >= 0 or right >= 0:
        column = torch.arange(k_len, device=query.device)
        visible = column <= position if causal else torch.ones_like(column <= position)
        if left >= 0:
            visible = visible & (column >= position - left)
        if right >= 0:
            visible = visible & (column <= position + right)
        mask = visible if mask is None else visible & mask
    mask = _with_position_bias(module, mask, attention_mask, k_len, layer_prefixes, kwargs)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)

    prefix_key, prefix_value = _prefix_of(module, layer_prefixes)
    if prefix_key is not None:
        ids, lens = _rows_of(module, layer_prefixes)
        if ids is None:
            prefix_key, prefix_value = (x.expand(query.shape[0], -1, -1, -1) for x in (prefix_key, prefix_value))
        else:
            mask = _mask_of_columns(mask, query, k_len)
            mask = torch.cat([_bank_mask(ids, lens, prefix_key.shape[2], mask), mask], dim=-1)
            prefix_key, prefix_value = _of_each_row(prefix_key, ids), _of_each_row(prefix_value, ids)
        if mask is not None and ids is None and mask.shape[-1] == k_len:
            seen = 1.0 if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (prefix_key.shape[2], 0), value=seen)
        if layer_prefixes.window_includes_prefix and left >= 0:
            mask = mask & _prefix_in_window(prefix_key.shape[2], ids, lens, position - left, k_len)
        key = torch.cat([prefix_key.to(key.dtype), key], dim=2)
        value = torch.cat([prefix_value.to(value.dtype), value], dim=2)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


def _of_each_row(bank: Tensor, ids: Tensor) -> Tensor:
    """``[B, Hkv, M * P, D]``: of the bank ``[N, Hkv, P, D]``, what each row sees one after another."""
    slots = ids.clamp(min=0).view(ids.shape[0], -1)
    return bank[slots].transpose(1, 2).flatten(2, 3)


def _bank_mask(ids: Tensor, lens: Tensor, length: int, mask: Tensor) -> Tensor:
    """Which columns of :func:`_of_each_row` are valid, to stand before ``mask``."""
    slots = ids.view(ids.shape[0], -1)
    valid = torch.arange(length, device=ids.device) < lens[slots.clamp(min=0)][..., None]
    valid = valid & (slots >= 0)[..., None]
    valid = valid.flatten(1)[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    return (
        valid if mask.dtype == torch.bool else torch.zeros_like(valid, dtype=mask.dtype).masked_fill(~valid, -torch.inf)
    )


def _prefix_in_window(length: int, ids: Tensor | None, lens: Tensor | None, first: Tensor, k_len: int) -> Tensor:
    """Which of ``length`` columns of prefixes, and the ``k_len`` after them, come no sooner than position ``first``.

    The row's prefixes end where the sequence, whose columns are all taken to be visible, begins.
    """
    if ids is None:
        position = torch.arange(-length, 0, device=first.device)
    else:
        slots = ids.view(ids.shape[0], -1)
        valid = torch.where(slots >= 0, lens[slots.clamp(min=0)], 0)
        begin = valid.cumsum(1) - valid - valid.sum(1, keepdim=True)
        position = begin[..., None] + torch.arange(length // slots.shape[1], device=first.device)
        position = position.flatten(1)[:, None, None]
    return F.pad(position >= first, (0, k_len), value=1.0)


def _mask_of_columns(mask: Tensor | None, query: Tensor, k_len: int) -> Tensor:
    """``mask`` with all the rows and columns that another can be joined to."""
    batch, _, q_len, _ = query.shape
    if mask is None:
        return torch.ones(batch, 1, 1, k_len, dtype=torch.bool, device=query.device)
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.expand(batch, -1, -1, k_len)


def _refuse(module: nn.Module, arguments: dict[str, object]) -> None:
    if arguments.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: the attention weights are never formed, so they cannot be returned; use the model "
            'without a prefix and attn_implementation="eager" to look at them'
        )


def prefix_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: object = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor | None:
    """Transformers' mask function: the padding, and nothing of size Sq x Sk where a rule can say the rest.

    The size of a sliding window is left to the attention function, whose module hands it over.

    Returns:
        One of

        - None: no padding; the attention function applies the module's own causality and window, with its last query
          at the last key.
        - bool ``[B, T]``: padding of all ``T`` positions up to the last query, and the same causality and window. A
          static cache has room for more keys than ``T``; a sliding cache has fewer, having dropped the first.
        - bool ``[B, 1, 1, Sk]``: padding and no causality.
        - bool ``[B, 1, Sq, Sk]``: everything, for what has no rule here: packed sequences, masks changed by the model,
          and the single query of a static cache, whose mask must keep its shape from step to step.
    """
    if mask_function is bidirectional_mask_function:
        if attention_mask is None:
            return None
        return _cut(attention_mask, kv_offset, kv_offset + kv_length)[:, None, None, :]

    # These are allowed where nothing is laid over the plain rule. The third kind of local attention comes in chunks.
    skips = allow_is_causal_skip or (allow_is_bidirectional_skip and getattr(config, "is_causal", True))
    is_window = local_size is not None and skips and getattr(config, "attention_chunk_size", None) is None
    if mask_function is causal_mask_function or is_window:
        # A static cache gives its offset as a tensor, once it has one.
        end = None if isinstance(q_offset, Tensor) else q_offset + q_length
        if end == kv_offset + kv_length:
            return None if attention_mask is None else _cut(attention_mask, 0, end)
        if end is not None and kv_offset == 0 and end < kv_length:
            if attention_mask is None:
                return torch.ones(batch_size, end, dtype=torch.bool, device=device)
            if attention_mask.shape[1] == end:
                return attention_mask
    elif q_length > 1:
        _warn_dense_mask(getattr(config, "model_type", "this model"))
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )


def _cut(padding: Tensor, begin: int, end: int) -> Tensor:
    """Columns ``[begin, end)``; those that are not there are padding."""
    padding = padding[:, begin:end]
    return padding if padding.shape[1] == end - begin else F.pad(padding, (0, end - begin - padding.shape[1]))


_warned_dense: set[str] = set()


def _warn_dense_mask(model_type: str) -> None:
    if not torch.compiler.is_compiling() and model_type not in _warned_dense:
        _warned_dense.add(model_type)
        warnings.warn(
            f"{model_type}: its attention pattern (packed sequences, or a mask of its own) is given to the kernels as "
            "a [B, 1, Sq, Sk] mask: right, but slower and larger",
            stacklevel=2,
        )


def register() -> None:
    """Make both attention functions and their mask function known to Transformers."""
    for name, function in {"prefix_kernels": prefix_attention_forward, "torch": torch_attention_forward}.items():
        AttentionInterface.register(implementation_name(name), function)
        AttentionMaskInterface.register(implementation_name(name), prefix_mask)


def implementation_name(attention: str) -> str:
    """The name of ``PrefixTuningConfig.attention`` in Transformers' registries."""
    return "prefix_kernels" if attention == "prefix_kernels" else f"prefix_kernels_{attention}"
