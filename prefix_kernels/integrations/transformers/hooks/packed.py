"""The hook that finds packed sequences in a call of a stack of layers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.runtime.packed_rows import (
    PACKED_ARGUMENT,
    PackedRows,
    found_packed_rows,
    told_packed_rows,
)
from prefix_kernels.integrations.transformers.structure.attention_sites import CROSS, AttentionSite
from prefix_kernels.integrations.transformers.structure.caches import CACHE_NAMES
from prefix_kernels.integrations.transformers.structure.key_shape import module_config
from prefix_kernels.integrations.transformers.structure.source import lays_masks_over


def takes_packed_rows(stack: nn.Module, sites: Sequence[AttentionSite]) -> bool:
    """Return True if its attentions' own causality and window, and where sequences begin, say all that a mask would.

    Args:
        stack: owner of a list of layers.
        sites: all attentions of the model.
    """
    inside = [site for site in sites if site.stack is stack]
    layers = {id(site.layer) for site in inside}
    lists = [child for child in stack.children() if isinstance(child, nn.ModuleList)]
    mixes_by_attention_alone = any(layers == {id(layer) for layer in child} for child in lists)
    # Not every stack has a config; attentions have.
    chunked = any(getattr(module_config(site.module), "attention_chunk_size", None) is not None for site in inside)
    crosses = any(site.role == CROSS for site in inside)
    return mixes_by_attention_alone and not chunked and not crosses and not lays_masks_over(stack)


class PackedSequences:
    """Forward pre-hook of a stack of layers: tells attention where sequences begin, in place of a mask of Sq x Sk.

    They are told by ``cu_seq_lens_q`` or found in ``position_ids`` that restart, both as ``DataCollatorWithFlattening``
    sends them. Compiled code cannot look into positions: there, the second kind stays a mask, as on a GPU.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.
    """

    def __init__(self, stack: nn.Module, owner: nn.Module | None) -> None:
        """Make the hook of ``stack``, the positions of whose tokens ``owner`` is given by its caller; None: nothing."""
        self.parameter_names = list(inspect.signature(stack.forward).parameters)
        # Elsewhere the mask is made outside of the stack.
        self.takes_positions = {"attention_mask", "position_ids"} <= set(self.parameter_names)
        self.numbers_by_itself = owner is None

    def __call__(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        names = ("hidden_states", "inputs_embeds", "input_ids")
        tokens = next((given[name] for name in names if given.get(name) is not None), None)
        if tokens is None:
            return None
        rows, length = tokens.shape[:2]
        mask = given.get("attention_mask")
        if self.takes_positions and mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return None  # masks of the caller's own, which say everything
        packed = told_packed_rows(given)
        if packed is None:
            packed = self._found(given, rows)
        if packed is None:
            return None
        if self.numbers_by_itself:
            raise ValueError(
                f"cu_seq_lens_q: expected a model that takes position_ids, got {type(stack).__name__}, which numbers "
                "the tokens of a row from its first to its last"
            )
        given[PACKED_ARGUMENT] = packed
        if self.takes_positions:
            if given.get("position_ids") is None:
                given["position_ids"] = packed.positions(rows, length)
            # Transformers hands a mask of four dimensions on as it is. Attention that knows where sequences begin does
            # not read it.
            given["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        return (), given

    def _found(self, given: dict[str, Any], rows: int) -> PackedRows | None:
        if not self.takes_positions or torch.compiler.is_compiling():
            return None
        positions: Tensor | None = given.get("position_ids")
        if positions is None or positions.dim() != 2 or positions.device.type not in ("cpu", "meta"):
            return None
        if given.get("attention_mask") is not None:
            return None
        if any(given.get(name) is not None for name in CACHE_NAMES):
            return None
        return found_packed_rows(positions, rows)
