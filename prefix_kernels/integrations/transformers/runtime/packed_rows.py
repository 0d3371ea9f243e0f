"""Batches without padding: where the sequences that lie one behind the other in the rows of a call begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefix_kernels.integrations.transformers.runtime.prefix_tree import PrefixTree
from prefix_kernels.integrations.transformers.structure.caches import past_length

# The keyword argument with which the hooks of a stack hand a PackedRows to each other.
PACKED_ARGUMENT = "packed_rows"
# The keyword arguments that DataCollatorWithFlattening(return_flash_attn_kwargs=True) adds to a batch.
_STARTS = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = "max_length_q"


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The N sequences of a call, which lie one behind the other in its rows ``[B, S]``.

    Attributes:
        starts: int32 or int64 ``[N + 1]``, from 0 to ``B * S``: sequence n is the tokens ``starts[n] : starts[n + 1]``
            of the rows, one row behind the other.
        longest: the length of the longest sequence; None: not known on the host.
        tree: the batch whose common beginnings the sequences are, each of which then sees those before it; None: each
            sees itself alone.
    """

    starts: Tensor
    longest: int | None = None
    tree: PrefixTree | None = None

    @property
    def count(self) -> int:
        """N, the number of sequences."""
        return self.starts.shape[0] - 1

    def of_tokens(self, rows: int, length: int) -> Tensor:
        """The number of the sequence that each token of the call belongs to: int64 ``[rows, length]``."""
        token = torch.arange(rows * length, device=self.starts.device)
        return torch.bucketize(token, self.starts[1:].to(token.dtype), right=True).view(rows, length)

    def positions(self, rows: int, length: int) -> Tensor:
        """The position of each token in its sequence, from 0 on: int64 ``[rows, length]``."""
        token = torch.arange(rows * length, device=self.starts.device).view(rows, length)
        return token - self.starts.to(token.dtype)[self.of_tokens(rows, length)]


def told_packed_rows(inputs: Mapping[str, Any]) -> PackedRows | None:
    """Read the packed sequences that the named ``inputs`` of a call tell by ``cu_seq_lens_q``, if any.

    On a GPU there are none where ``position_ids`` tell the same: Transformers makes a mask of those.

    Raises:
        NotImplementedError: they are not on a CPU, and there are no ``position_ids``.
        ValueError: there are also a mask or a cache, or lengths of keys that are not those of the queries.
    """
    starts, starts_k = (inputs.get(name) for name in _STARTS)
    if starts is None and starts_k is None:
        return None
    if starts is None or starts_k is None or starts.shape != starts_k.shape:
        got = tuple(None if x is None else list(x.shape) for x in (starts, starts_k))
        raise ValueError(f"cu_seq_lens_q, cu_seq_lens_k: expected int32 or int64 [N + 1] for both, got {got}")
    if starts.device.type not in ("cpu", "meta"):
        if inputs.get("position_ids") is not None:
            return None
        raise NotImplementedError(
            f"cu_seq_lens_q: expected a tensor on a CPU, where packed sequences are attended to, got {starts.device}; "
            "position_ids that restart say the same by a mask"
        )
    if starts is not starts_k and not torch.compiler.is_compiling() and not torch.equal(starts, starts_k):
        raise ValueError("cu_seq_lens_k: expected the values of cu_seq_lens_q, got others: keys are those of the batch")
    if inputs.get("attention_mask") is not None:
        raise ValueError("attention_mask: expected None with cu_seq_lens_q, as packed sequences have no padding")
    past = past_length(inputs)
    if isinstance(past, int) and past > 0:
        raise ValueError(f"past_key_values: expected no tokens with cu_seq_lens_q, got {past}")
    longest = inputs.get(_LONGEST)
    return PackedRows(starts, longest if isinstance(longest, int) else None)


def found_packed_rows(position_ids: Tensor, rows: int) -> PackedRows | None:
    """Find the packed sequences of a call in its ``position_ids`` ``[1 or rows, S]``, if any.

    As in Transformers, a sequence ends where the next position is not one more. It reads the positions on the host.
    """
    position_ids = position_ids.expand(rows, -1)
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    starts = begins.flatten().nonzero().flatten()
    if starts.shape[0] == rows:
        return None
    starts = torch.cat([starts, starts.new_tensor([position_ids.numel()])])
    return PackedRows(starts, int(starts.diff().amax()))
