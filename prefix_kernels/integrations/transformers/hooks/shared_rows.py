"""The hooks by which a stack of layers computes what the rows of a call have in common once."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from prefix_kernels.integrations.transformers.hooks.positions import count_tokens, find_position_table, takes_padding
from prefix_kernels.integrations.transformers.runtime.call_context import CallContext
from prefix_kernels.integrations.transformers.runtime.call_prefixes import PREFIX_ARGUMENT, CallPrefixes
from prefix_kernels.integrations.transformers.runtime.packed_rows import PACKED_ARGUMENT, PackedRows
from prefix_kernels.integrations.transformers.runtime.prefix_tree import PrefixTree, prefix_tree
from prefix_kernels.integrations.transformers.runtime.selection import PREFIX_NAMES
from prefix_kernels.integrations.transformers.structure.caches import CACHE_NAMES
from prefix_kernels.integrations.transformers.structure.key_shape import module_config

_log = logging.getLogger("prefix_kernels.share_prefixes")
# Fewer than this share of a batch's tokens have to be computed, or the batch runs as it is.
_WORTH_SHARING = 0.9
_warned_devices: set[str] = set()


class ShareRows:
    """Forward pre-hook of a stack: gives it the tree of the batch as packed sequences, in place of the batch.

    An instance, not a closure, so that ``copy.deepcopy`` and ``pickle`` of the model take it along.

    Attributes:
        counts_tokens: True where a model numbers its tokens along the padding mask.
        context: the selections of a prepared model; None: the model has no prefix.
        slides: True where the prefix of the model slides out of windows.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.parameter_names = list(inspect.signature(stack.forward).parameters)
        table = find_position_table(stack)
        self.counts_tokens = table is not None and takes_padding(table)
        self.context: CallContext[Any] | None = None
        self.slides = False

    # Trees are built on the host.
    @torch.compiler.disable
    def __call__(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        if (reason := self._why_not(stack, given)) is not None:
            _log.debug("%s: the batch runs as it is: %s", type(stack).__name__, reason)
            return None
        input_ids: Tensor = given["input_ids"]
        rows, length = input_ids.shape
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if positions is None:
            counted = mask if self.counts_tokens else None
            positions = count_tokens(counted, 0, length, input_ids.device)
        tree = prefix_tree(input_ids, positions, None if mask is None else mask.bool())
        total = int((tree.places >= 0).sum())
        if len(tree.tokens) > _WORTH_SHARING * total:
            _log.debug("%s: the batch runs as it is: its rows have too little in common", type(stack).__name__)
            return None
        _log.debug("%s: %d of %d tokens are computed", type(stack).__name__, len(tree.tokens), total)
        given |= {
            "input_ids": input_ids.flatten()[tree.tokens][None],
            "position_ids": positions.expand(rows, -1).flatten()[tree.tokens][None],
            # Transformers hands a mask of four dimensions on as it is. Attention that knows the tree does not read it.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
            "use_cache": False,
            PACKED_ARGUMENT: PackedRows(tree.starts, tree.longest, tree),
        }
        return (), given

    def _why_not(self, stack: nn.Module, given: Mapping[str, Any]) -> str | None:
        """Return the reason why a call with the named arguments ``given`` cannot be shared, if there is one."""
        input_ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if input_ids is None or given.get("inputs_embeds") is not None:
            return "it has inputs_embeds"
        if input_ids.dim() != 2 or input_ids.shape[0] < 2 or input_ids.shape[1] == 0:
            return "it has one row"
        if input_ids.device.type != "cpu":
            _warn_of_device(input_ids.device.type)
            return f"it is on {input_ids.device}"
        if any(given.get(name) is not None for name in CACHE_NAMES) or self._keeps_cache(stack, given):
            return "it keeps a cache"
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == input_ids.shape):
            return "its mask is no padding [B, S]"
        if positions is not None and not (positions.dim() == 2 and positions.shape[1] == input_ids.shape[1]):
            return "its position_ids are not [B, S]"
        if given.get(PREFIX_NAMES) is not None or (self.context is not None and self.context.open_count):
            return "its rows name prefixes, or record keys"
        if self.slides:
            return "its prefix slides out of windows"
        if given.get("output_router_logits"):
            return "it returns the router's logits"
        known = ("input_ids", "attention_mask", "position_ids")
        others = [name for name, x in given.items() if name not in known and _is_per_token(x, input_ids.shape)]
        return f"{others[0]} has values for its tokens" if others else None

    def _keeps_cache(self, stack: nn.Module, given: Mapping[str, Any]) -> bool:
        """Return True if the call would hand out a cache; in training, only where one was asked for."""
        asked = given.get("use_cache")
        if asked is None:
            return not torch.is_grad_enabled() and bool(getattr(module_config(stack), "use_cache", False))
        return bool(asked)


def _is_per_token(x: object, shape: torch.Size) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 2 and x.shape[:2] == shape


def _warn_of_device(device_type: str) -> None:
    if device_type not in _warned_devices:
        _warned_devices.add(device_type)
        warnings.warn(
            f"share_prefixes: expected a model on a CPU, where packed sequences are attended to, got one on "
            f"{device_type}: its batches run as they are",
            stacklevel=2,
        )


def hand_over_packed(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a stack without prefixes: packed rows travel to the attentions as prefixes do."""
    packed = kwargs.pop(PACKED_ARGUMENT, None)
    return None if packed is None else (args, kwargs | {PREFIX_ARGUMENT: CallPrefixes({}, packed=packed)})


@torch.compiler.disable
def hand_out_rows(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a stack: gives every row its states, also of the tokens that it shares."""
    prefixes: CallPrefixes | None = kwargs.get(PREFIX_ARGUMENT)
    if prefixes is None or prefixes.packed is None or prefixes.packed.tree is None:
        return None
    return _handed_out(output, prefixes.packed.tree)


def _handed_out(x: Any, tree: PrefixTree) -> Any:
    if isinstance(x, ModelOutput):
        return type(x)(**{name: _handed_out(part, tree) for name, part in x.items()})
    if isinstance(x, (tuple, list)):
        return type(x)(_handed_out(part, tree) for part in x)
    if not isinstance(x, Tensor) or x.shape[:2] != (1, len(tree.tokens)):
        return x
    rows = x[0][tree.places.clamp(min=0)]
    is_padding = (tree.places < 0).view(*tree.places.shape, *(1,) * (x.dim() - 2))
    return rows.masked_fill(is_padding, 0.0)
