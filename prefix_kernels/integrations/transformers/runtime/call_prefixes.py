"""The prefixes that travel with one call of a stack of layers, and what an attention finds in them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from prefix_kernels.integrations.transformers.runtime.packed_rows import PackedRows
from prefix_kernels.integrations.transformers.runtime.relative_bias import StackBias
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixPair

PREFIX_ARGUMENT = "call_prefixes"
# Set on every attention module with a prefix: its index in PrefixLayout.sites.
SITE_ATTRIBUTE = "prefix_site"
# Set on those of them that are not given the prefixes as an argument: their PrefixRelay.
RELAY_ATTRIBUTE = "prefix_relay"


@dataclass(eq=False)
class CallPrefixes:
    """The prefixes of a stack of layers for one call of it.

    Attributes:
        pairs: ``(prefix_key, prefix_value)`` of each attention by its index among the sites: ``[Hkv, P, D]``, or with
            ``ids`` a bank ``[N, Hkv, P, D]``. Empty: the call has no prefixes.
        window_includes_prefix: of :class:`prefix_kernels.integrations.transformers.config.PrefixTuningConfig`.
        ids: ``[B]`` or ``[B, M]``, the prefixes of the bank that each row, or packed sequence, sees; -1 is none.
        lens: the valid lengths ``[N]`` of each attention's bank, by its index among the sites.
        detached_from: what ``pairs`` were detached from, until their gradients have been given a way back (see
            :func:`prefix_kernels.integrations.transformers.hooks.stack.first_layer_hook`); otherwise None.
        bias: the stack's position bias, where it is known how to make it.
        counts_positions: True where the prefix has the positions before the sequence (``position_offset="peft"``).
        sites: in a layer that is called more than once, the sites of its attentions in this call by those of their
            first calls; an attention that is missing has no prefix in this call. None elsewhere.
        inputs: arguments of the earlier calls of such layers; see
            :mod:`prefix_kernels.integrations.transformers.hooks.shared_layers`.
        recorded: gets the keys and values ``[B, Hkv, Sk, D]`` of the sequence, by site; None: they are not asked for.
        packed: the sequences that lie one behind the other in the rows, each with an entry of its own in ``ids``;
            None: each row is one.
    """

    pairs: dict[int, PrefixPair]
    window_includes_prefix: bool = False
    ids: Tensor | None = None
    lens: dict[int, Tensor] | None = None
    detached_from: dict[int, PrefixPair] | None = None
    bias: StackBias | None = None
    counts_positions: bool = False
    sites: dict[int, int] | None = None
    inputs: dict[int, list[StorageWeakRef | None]] = field(default_factory=dict)
    recorded: dict[int, PrefixPair] | None = None
    packed: PackedRows | None = None

    def site_of(self, module: nn.Module) -> int | None:
        """The index of the attention ``module``, in this call of it, among the sites; None: it has no prefix."""
        return self.called_site(module) if self.pairs else None

    def called_site(self, module: nn.Module) -> int | None:
        """Return the site of ``module`` in this call, also where the call has no prefixes; None: it has none."""
        site: int | None = getattr(module, SITE_ATTRIBUTE, None)
        return site if self.sites is None or site is None else self.sites.get(site)


class PrefixRelay(threading.local):
    """Keeps, per thread, the prefixes of the layer call that began last, for attentions that are not given them."""

    prefixes: CallPrefixes | None = None

    def __reduce__(self) -> tuple[type[PrefixRelay], tuple[()]]:
        return PrefixRelay, ()


def prefixes_of_call(module: nn.Module, arguments: dict[str, Any]) -> CallPrefixes | None:
    """Take out of the ``arguments`` that ``module`` gives its attention function the prefixes of this call."""
    prefixes: CallPrefixes | None = arguments.pop(PREFIX_ARGUMENT, None)
    relay: PrefixRelay | None = getattr(module, RELAY_ATTRIBUTE, None)
    return relay.prefixes if prefixes is None and relay is not None else prefixes


def prefix_of(
    module: nn.Module, key: Tensor, value: Tensor, prefixes: CallPrefixes | None
) -> PrefixPair | tuple[None, None]:
    """Return the prefix of ``module`` in this call, whose ``key`` and ``value`` are ``[B, Hkv, Sk, D]``.

    Raises:
        RuntimeError: the call has lost its prefixes, or would lose their gradients.
        ValueError: the prefix has other heads or another head dim than ``key`` and ``value``.
    """
    site = getattr(module, SITE_ATTRIBUTE, None)
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
    prefix_key, prefix_value = prefixes.pairs[site]
    for name, states, prefix in (("keys", key, prefix_key), ("values", value, prefix_value)):
        if (states.shape[1], states.shape[3]) != (prefix.shape[-3], prefix.shape[-1]):
            raise ValueError(
                f"{type(module).__name__} of prefix {site}: expected {name} of {prefix.shape[-3]} heads and head dim "
                f"{prefix.shape[-1]}, as read from the module when the model was prepared, got {states.shape[1]} and "
                f"{states.shape[3]}: this kind of attention is not understood"
            )
    if not torch.is_grad_enabled() and prefix_key.requires_grad and prefix_key.grad_fn is not None:
        raise RuntimeError(
            f"{type(module).__name__} of prefix {site} runs without gradients in a forward pass that needs them: "
            "reentrant activation checkpointing that get_prefix_model does not know of would lose the gradient of the "
            "prefix; use use_reentrant=False, or torch's checkpoint_wrapper before get_prefix_model"
        )
    return prefix_key, prefix_value


def record(module: nn.Module, key: Tensor, value: Tensor, prefixes: CallPrefixes | None) -> None:
    """Store the keys and values of ``module`` in the open recording, if there is one."""
    if prefixes is not None and prefixes.recorded is not None and (site := prefixes.called_site(module)) is not None:
        prefixes.recorded[site] = key, value


def rows_of(module: nn.Module, prefixes: CallPrefixes | None) -> tuple[Tensor | None, Tensor | None]:
    """``(prefix_ids, prefix_lens)`` of a mixed batch, or None for both."""
    if prefixes is None or prefixes.ids is None or prefixes.lens is None:
        return None, None
    site = prefixes.site_of(module)
    return (None, None) if site is None else (prefixes.ids, prefixes.lens[site])
