"""The relative position bias of T5, as the mask that :func:`prefix_kernels.prefix_attention` adds to its scores.

T5 has no positions but a bias ``[1, Hq, Sq, Sk]`` on the scores of every self-attention, which the first layer of a
stack looks up in a table and all its layers share; in UMT5 each layer has a table of its own. The bias has no columns
for the prefix. They get zero, or where the prefix counts as the ``P`` positions before the sequence
(``position_offset="peft"``), what the table says for those.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.structure.caches import past_length
from prefix_kernels.integrations.transformers.structure.offload import loaded

_TABLE = "relative_attention_bias"


@dataclass(eq=False)
class StackBias:
    """The position bias of one call of a stack.

    Attributes:
        before: the bias ``[1, Hq, Sq, T]`` of the ``T`` positions before the sequence; None is zero.
        before_by_module: the same of each attention that has a table of its own; the others have ``before``.
        columns: which of these positions the prefixes of each row have; None: one prefix of length ``T`` has them all.
        masks: what :meth:`mask` made last for each length of the prefix, after what it was made from.
    """

    before: Tensor | None = None
    columns: BankColumns | None = None
    masks: list[tuple[int, Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    before_by_module: dict[nn.Module, Tensor] = field(default_factory=dict)

    def mask(
        self,
        bias: Tensor,
        attention_mask: Tensor | None,
        visible: Tensor | None,
        k_len: int,
        prefix_len: int,
        module: nn.Module | None = None,
    ) -> Tensor:
        """:func:`biased_mask`, made once for all layers of the same ``bias`` whose prefixes have the same length.

        With padding it is ``[B, Hq, Sq, P + Sk]``, and each layer would keep its own for the backward pass.

        Args:
            bias, attention_mask: as the attention module gave them: the same objects in each layer that shares a table.
            visible: what ``attention_mask`` says.
            k_len: ``Sk``.
            prefix_len: ``P``, of this layer's prefix or bank; 0 without one.
            module: the attention. Default: one without a table of its own.
        """
        # A list, because looking up a length in a dict would compile the model for that length alone.
        for length, of_bias, of_mask, made in self.masks:
            if length == prefix_len and of_bias is bias and of_mask is attention_mask:
                return made
        made = biased_mask(bias, visible, k_len, self._prefix_bias(prefix_len, module))
        others = [known for known in self.masks if known[0] != prefix_len]
        self.masks = [*others, (prefix_len, bias, attention_mask, made)]
        return made

    def _prefix_bias(self, prefix_len: int, module: nn.Module | None) -> Tensor | None:
        """Return the position bias of the columns of a prefix of ``prefix_len`` tokens in ``module``."""
        if self.before is None or prefix_len == 0:
            return None
        before = self.before_by_module.get(module, self.before) if module is not None else self.before
        return before if self.columns is None else self.columns.bias(before, prefix_len)


@dataclass(frozen=True, eq=False)
class BankColumns:
    """The prefixes of a bank that each row sees, one after another before its sequence.

    Attributes:
        ids: int64 ``[B]`` or ``[B, M]``, indices into the bank; -1 is none.
        shifts: int64 ``[N]``, how many positions each prefix of the bank takes: its length, or 0.
    """

    ids: Tensor
    shifts: Tensor

    @property
    def slots(self) -> int:
        """``M``."""
        return self.ids.shape[1] if self.ids.dim() == 2 else 1

    def bias(self, before: Tensor, prefix_len: int) -> Tensor:
        """The bias of the columns of a bank ``[N, Hkv, P, D]``.

        Args:
            before: ``[1, Hq, Sq, T]``, that of the ``T`` positions before the sequence, ``T`` at least their sum in any
                row.
            prefix_len: ``P``.

        Returns:
            ``[B, Hq, Sq, M * P]``; zero where a prefix takes no position.
        """
        ids = self.ids.view(self.ids.shape[0], -1)
        shifts = torch.where(ids >= 0, self.shifts[ids.clamp(min=0)], 0)
        begin = shifts.cumsum(1) - shifts - shifts.sum(1, keepdim=True)
        token = torch.arange(prefix_len, device=ids.device)
        position = begin[..., None] + token
        takes = (token < shifts[..., None]).flatten(1)
        column = torch.where(takes, position.flatten(1) + before.shape[-1], 0)
        bias = before[0][:, :, column].permute(2, 0, 1, 3)
        return bias.masked_fill(~takes[:, None, None], 0.0)


def biased_mask(bias: Tensor, visible: Tensor | None, k_len: int, prefix_bias: Tensor | None = None) -> Tensor:
    """The bias where it is visible.

    Args:
        bias: ``[1, Hq, Sq, T]`` with ``T >= Sk``: a static cache has room for keys that are not there yet.
        visible: None, bool or floating, broadcastable to ``[B, Hq, Sq, Sk]``.
        k_len: ``Sk``.
        prefix_bias: ``[1, Hq, Sq, P]`` or ``[B, Hq, Sq, M * P]``, for columns that are always visible. Default: no
            such columns.

    Returns:
        The values of ``bias`` itself where there is nothing to add, else a new tensor. It has no graph.
    """
    bias = bias.detach()[..., :k_len]
    if prefix_bias is not None:
        # Before the batch enters, if it does not enter here: this copy then has the size of one row's mask.
        bias = torch.cat([prefix_bias.to(bias.dtype), bias.expand(prefix_bias.shape[0], -1, -1, -1)], dim=-1)
        if visible is not None:
            seen = 1.0 if visible.dtype == torch.bool else 0.0
            visible = F.pad(visible, (prefix_bias.shape[-1], 0), value=seen)
    if visible is None:
        return bias
    return bias.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else bias + visible


def position_bias_of(module: nn.Module, bias: Tensor | None) -> Tensor | None:
    """The ``bias`` that ``module`` gave its attention function, if it says something.

    Raises:
        ValueError: the table is being trained.
    """
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


class _BiasedAttention(Protocol):
    """The members of T5's attention that are used here."""

    is_decoder: bool

    def compute_bias(
        self, query_length: int, key_length: int, *, device: torch.device, past_seen_tokens: int | Tensor
    ) -> Tensor: ...


class RelativeBias:
    """Makes the :class:`StackBias` of each call of a stack.

    Args:
        stack: a stack of layers whose first attention, or each of them, holds a table of relative positions.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.stack = stack
        self.attentions = [module for module in stack.modules() if hasattr(module, _TABLE)]
        self.parameter_names = list(inspect.signature(stack.forward).parameters)

    def __call__(self, num_positions: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StackBias:
        """The bias for a call of the stack with these arguments.

        Args:
            num_positions: ``T``, how many positions before the sequence the prefix may have; with 0 it has no bias.
        """
        inputs = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        tokens = [inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
        if num_positions == 0 or len(tokens) != 1:  # the stack says what is wrong
            return StackBias()
        first = self._before(self.attentions[0], num_positions, tokens[0], inputs)
        if len(self.attentions) == 1:
            return StackBias(first)
        others = {module: self._before(module, num_positions, tokens[0], inputs) for module in self.attentions[1:]}
        return StackBias(first, before_by_module={self.attentions[0]: first} | others)

    def _before(self, module: nn.Module, num_positions: int, tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
        attention = cast(_BiasedAttention, module)
        past = past_length(inputs) if attention.is_decoder else 0
        table = getattr(attention, _TABLE)
        with torch.no_grad(), loaded(table, self.stack) if table.weight.is_meta else nullcontext():
            # A table that its own hook loads as it is called is still meta here.
            device = tokens.device if table.weight.is_meta else table.weight.device
            return attention.compute_bias(
                tokens.shape[1], num_positions, device=device, past_seen_tokens=past + num_positions
            )


def has_relative_bias(stack: nn.Module) -> bool:
    """Return True if ``stack`` holds a table of relative positions."""
    return any(hasattr(module, _TABLE) for module in stack.modules())
