"""Layers that share weights: one module, called once for each depth, with a prefix for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from prefix_kernels.integrations.transformers.runtime.call_prefixes import PREFIX_ARGUMENT, CallPrefixes
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout


class SharedLayerHook:
    """Forward pre-hook of a layer that its stack calls more than once: tells its attentions which call it is.

    Calls are counted within one forward pass. What activation checkpointing runs again during the backward pass comes
    after the last of them; which one it repeats is known by the memory of its input, which the checkpoint has kept.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, layer: nn.Module, layout: PrefixLayout) -> None:
        sites = [(index, site) for index, site in enumerate(layout.sites) if site.layer is layer]
        self.calls = sites[0][1].calls
        first = {id(site.module): index for index, site in reversed(sites)}
        self.layer = sites[0][0]
        # For each call, the site of each attention by the first site of the same module.
        self.sites = [
            {first[id(site.module)]: index for index, site in sites if site.call == call} for call in range(self.calls)
        ]

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prefixes = kwargs.get(PREFIX_ARGUMENT)
        if prefixes is None:
            return None
        call = self._call(prefixes, args[0] if args else kwargs["hidden_states"])
        return args, kwargs | {PREFIX_ARGUMENT: replace(prefixes, sites=self.sites[call])}

    def _call(self, prefixes: CallPrefixes, hidden_states: Tensor) -> int:
        inputs = prefixes.inputs.setdefault(self.layer, [])
        if len(inputs) < self.calls:
            # A compiled layer is traced once for each call, and its checkpoints run again without Python.
            compiling = torch.compiler.is_compiling()
            inputs.append(None if compiling else StorageWeakRef(hidden_states.untyped_storage()))
            return len(inputs) - 1
        storage = StorageWeakRef(hidden_states.untyped_storage())
        found = [call for call, known in enumerate(inputs) if known == storage]
        if len(found) != 1:
            raise RuntimeError(
                f"{type(hidden_states).__name__} of shape {list(hidden_states.shape)}: a layer with shared weights ran "
                "again on an input that this forward pass did not give it, so which prefix it needs is not known; "
                "activation checkpointing has to keep the layer's input, not a copy"
            )
        return found[0]
