"""A bank: the prefixes of several tasks, stacked for the attentions of one stack of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixPair


@dataclass(eq=False)
class PrefixBank:
    """The prefixes of several tasks for the attentions of one stack.

    Attributes:
        pairs: ``(prefix_key, prefix_value)`` ``[N, Hkv, P, D]`` of each attention, by its index among the sites, ``P``
            being the longest. Beyond a prefix's own length they are zero.
        lens: ``[N]``, the length of each, by site.
    """

    pairs: dict[int, PrefixPair]
    lens: dict[int, Tensor]

    def let_sizes_vary(self) -> None:
        """Let code that is compiled with this bank take others, of more or longer prefixes, without compiling anew.

        ``torch.compile`` makes code of its own for a size of 1 (one task, or prefixes of one token) nevertheless.
        """
        for pair in self.pairs.values():
            for tensor in pair:
                torch._dynamo.maybe_mark_dynamic(tensor, (0, 2))
        for lens in self.lens.values():
            torch._dynamo.maybe_mark_dynamic(lens, 0)


def stack_prefixes(prefixes: Sequence[Mapping[int, PrefixPair]]) -> PrefixBank:
    """One bank of the prefixes ``[Hkv, P, D]`` of several tasks, each given by site. Gradients flow back to them."""
    bank = PrefixBank({}, {})
    for site in prefixes[0]:
        pairs = [prefix[site] for prefix in prefixes]
        lengths = [key.shape[1] for key, _ in pairs]
        longest = max(lengths)
        keys, values = (
            torch.stack([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in tensors])
            for tensors in zip(*pairs, strict=True)
        )
        bank.pairs[site] = keys, values
        bank.lens[site] = torch.tensor(lengths, device=pairs[0][0].device)
    return bank
