"""The relative position bias of T5, as the mask that :func:`prefix_kernels.prefix_attention` adds to its scores.

T5 has no positions but a bias ``[1, Hq, Sq, Sk]`` on the scores of every self-attention, which the first layer of a
stack looks up in a table and all its layers share. It has no columns for the prefix. They get zero, or where the prefix
counts as the ``P`` positions before the sequence (``position_offset="peft"``), what the table says for those.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TABLE = "relative_attention_bias"


@dataclass(eq=False)
class StackBias:
    """The position bias of one call of a stack.

    Attributes:
        prefix: what the columns of the prefix get, ``[1, Hq, Sq, P]``; None is zero.
        masks: what :meth:`mask` made, by whether it has columns for the prefix, after what it was made from.
    """

    prefix: Tensor | None = None
    masks: dict[bool, tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=dict)

    def mask(
        self, bias: Tensor, attention_mask: Tensor | None, visible: Tensor | None, k_len: int, has_prefix: bool
    ) -> Tensor:
        """:func:`biased_mask`, made once for all layers.

        With padding it is ``[B, Hq, Sq, P + Sk]``, and each layer would keep its own for the backward pass.

        Args:
            bias, attention_mask: as the attention module gave them: the same objects in each layer.
            visible: what ``attention_mask`` says.
            k_len: ``Sk``.
            has_prefix: whether this layer does.
        """
        wide = has_prefix and self.prefix is not None
        known = self.masks.get(wide)
        if known is None or known[0] is not bias or known[1] is not attention_mask:
            known = (bias, attention_mask, biased_mask(bias, visible, k_len, self.prefix if wide else None))
            self.masks[wide] = known
        return known[2]


def biased_mask(bias: Tensor, visible: Tensor | None, k_len: int, prefix_bias: Tensor | None = None) -> Tensor:
    """The bias where it is visible.

    Args:
        bias: ``[1, Hq, Sq, T]`` with ``T >= Sk``: a static cache has room for keys that are not there yet.
        visible: None, bool or floating, broadcastable to ``[B, Hq, Sq, Sk]``.
        k_len: ``Sk``.
        prefix_bias: ``[1, Hq, Sq, P]``, for columns that are always visible. Default: no such columns.

    Returns:
        The values of ``bias`` itself where there is nothing to add, else a new tensor. It has no graph.
    """
    bias = bias.detach()[..., :k_len]
    if prefix_bias is not None:
        # Before the batch enters: this copy has the size of one row's mask.
        bias = torch.cat([prefix_bias.to(bias.dtype), bias], dim=-1)
        if visible is not None:
            seen = 1.0 if visible.dtype == torch.bool else 0.0
            visible = F.pad(visible, (prefix_bias.shape[-1], 0), value=seen)
    if visible is None:
        return bias
    return bias.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else bias + visible


def position_bias_of(module: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    """The bias that ``module`` gave its attention function, if it says something.

    Raises:
        ValueError: the table is being trained.
    """
    bias = arguments.get("position_bias")
    # T5 has one class for all attention. Cross-attention, the only one of a decoder that is not causal, gets zeros.
    if bias is None or (getattr(module, "is_decoder", False) and not module.is_causal):
        return None
    table = getattr(module, _TABLE, None)
    if table is not None and table.weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{type(module).__name__}.{_TABLE}.weight: expected a frozen table, got requires_grad=True: "
            "the kernels form no gradient of a position bias; freeze it, or call the model under torch.no_grad()"
        )
    return bias


class RelativeBias:
    """Makes the :class:`StackBias` of each call of a stack.

    Args:
        stack: a stack of layers whose first attention holds a table of relative positions.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.attention = next(module for module in stack.modules() if hasattr(module, _TABLE))
        self.parameter_names = list(inspect.signature(stack.forward).parameters)

    def __call__(self, num_positions: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StackBias:
        """The bias for a call of the stack with these arguments.

        The prefix counts as ``num_positions`` positions before the sequence; with 0 it has no bias.
        """
        inputs = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        tokens = [inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
        if num_positions == 0 or len(tokens) != 1:  # the stack says what is wrong
            return StackBias()
        cache = inputs.get("past_key_values") if self.attention.is_decoder else None
        past = 0 if cache is None else cache.get_seq_length()
        with torch.no_grad():
            return StackBias(
                self.attention.compute_bias(tokens[0].shape[1], num_positions, past_seen_tokens=past + num_positions)
            )


def has_relative_bias(stack: nn.Module) -> bool:
    """Whether ``stack`` holds such a table."""
    return any(hasattr(module, _TABLE) for module in stack.modules())
