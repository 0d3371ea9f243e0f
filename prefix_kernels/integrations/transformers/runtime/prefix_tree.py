"""The tree of a batch: tokens that rows have in common at their beginning, once each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Rows with fewer tokens in common have them each for itself: a node costs a cell of its own in every kernel.
SHORTEST_NODE = 8


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The rows ``[B, S]`` of a batch as N packed sequences, the nodes of a tree; T tokens in all.

    Attributes:
        tokens: int64 ``[T]``, for each token of the nodes its place in the flattened batch.
        starts: int32 ``[N + 1]``: node n is the tokens ``starts[n] : starts[n + 1]``.
        ancestors: int64 ``[N, M]``, the nodes before each node, from the root down; -1 is none.
        places: int64 ``[B, S]``, for each token of the batch its place among the nodes' tokens; -1 for padding.
        longest: the length of the longest node.
    """

    tokens: Tensor
    starts: Tensor
    ancestors: Tensor
    places: Tensor
    longest: int


@dataclass
class _Node:
    """The tokens ``begin : end`` of the rows ``first : last``, in sorted order, below ``parent``."""

    first: int
    last: int
    begin: int
    end: int
    parent: int


def prefix_tree(input_ids: Tensor, position_ids: Tensor, padding: Tensor | None) -> PrefixTree:
    """Build the tree of a batch; tokens are the same if what is before them is, and their ids and positions are.

    Args:
        input_ids, position_ids: ``[B, S]``.
        padding: bool ``[B, S]``, False for padding, which belongs to no node; None: there is none.
    """
    rows, length = input_ids.shape
    marks = torch.stack([input_ids, position_ids.expand(rows, -1)], -1).tolist()
    shown = None if padding is None else padding.tolist()
    columns = [[j for j in range(length) if shown is None or shown[i][j]] for i in range(rows)]
    keys = [[tuple(marks[i][j]) for j in columns[i]] for i in range(rows)]
    order = sorted(range(rows), key=keys.__getitem__)
    nodes = _nodes([keys[i] for i in order])

    tokens: list[int] = []
    starts, places = [0], torch.full((rows, length), -1)
    chains: list[list[int]] = []
    for node in nodes:
        row = order[node.first]
        for i in order[node.first : node.last]:
            own = columns[i][node.begin : node.end]
            places[i, own] = torch.arange(len(tokens), len(tokens) + len(own))
        tokens += [row * length + j for j in columns[row][node.begin : node.end]]
        starts.append(len(tokens))
        chains.append([] if node.parent < 0 else [*chains[node.parent], node.parent])
    depth = max((len(chain) for chain in chains), default=0)
    ancestors = [chain + [-1] * (max(depth, 1) - len(chain)) for chain in chains]
    device = input_ids.device
    return PrefixTree(
        torch.tensor(tokens, dtype=torch.int64, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(ancestors, dtype=torch.int64, device=device),
        places.to(device),
        max((end - start for start, end in pairwise(starts)), default=0),
    )


def _nodes(keys: Sequence[Sequence[object]]) -> list[_Node]:
    """The nodes of sorted rows, parents before their children."""
    shared = [_common(one, other) for one, other in pairwise(keys)]
    nodes: list[_Node] = []
    # Rows, the first of their tokens that no node has yet, and the node before it.
    open_groups = [(0, len(keys), 0, -1)]
    while open_groups:
        first, last, begin, parent = open_groups.pop()
        common = min(shared[first : last - 1], default=len(keys[first]))
        are_equal = common == len(keys[last - 1])
        if common > begin and (are_equal or common - begin >= SHORTEST_NODE):
            nodes.append(_Node(first, last, begin, common, parent))
            begin, parent = common, len(nodes) - 1
        if not are_equal:
            # Rows part between these neighbours; a row that ends here is a group of its own.
            edges = [first, *(i + 1 for i in range(first, last - 1) if shared[i] == common), last]
            open_groups += [(a, b, begin, parent) for a, b in reversed(list(pairwise(edges)))]
    return nodes


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
