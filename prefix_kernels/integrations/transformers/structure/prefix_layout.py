"""The attentions of a model that have a prefix, its length, and the table that it lies in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.structure.attention_sites import AttentionSite
from prefix_kernels.nn.encoder import PrefixEncoder

PrefixPair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class PrefixGroup:
    """Attentions of one role whose prefixes share a table, because they have the same shape and length.

    Attributes:
        name: the role, numbered from the second group of a role on.
        sites: indices into :attr:`PrefixLayout.sites`.
        num_virtual_tokens: ``P``.
        num_kv_heads: ``Hkv``.
        head_dim: ``D``.
        value_head_dim: ``Dv``.
    """

    name: str
    sites: list[int]
    num_virtual_tokens: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int

    def encoder_in(self, encoder: PrefixEncoder | nn.ModuleDict) -> PrefixEncoder:
        """The part of a model's prefix module that holds the table of this group."""
        # nn.ModuleDict does not know the types of its modules.
        return encoder if isinstance(encoder, PrefixEncoder) else cast(PrefixEncoder, encoder[self.name])


class PrefixLayout:
    """The prefixes of a model as ``config`` wants them.

    Attributes:
        sites: the attentions with a prefix; a prefix pair is found by its index here.
        groups: the tables that hold the prefixes.
        stacks: the modules whose layers contain ``sites``.

    Raises:
        ValueError: ``config`` names an attention or a layer that the model does not have, or a wrong number of lengths.
    """

    def __init__(self, sites: Sequence[AttentionSite], config: PrefixTuningConfig) -> None:
        roles = list(dict.fromkeys(site.role for site in sites))
        wanted = roles if config.target_attentions is None else config.target_attentions
        if unknown := [role for role in wanted if role not in roles]:
            raise ValueError(f"target_attentions: expected names among {roles}, got {unknown[0]!r}")
        self.sites: list[AttentionSite] = []
        self.groups: list[PrefixGroup] = []
        for role in roles:
            if role in wanted:
                self._add_role(role, [site for site in sites if site.role == role], config)
        self.stacks = list({id(site.stack): site.stack for site in self.sites}.values())

    def _add_role(self, role: str, sites: list[AttentionSite], config: PrefixTuningConfig) -> None:
        layers = _of_role("layers", role, config.layers)
        if layers is not None:
            if outside := [layer for layer in layers if layer >= len(sites)]:
                raise ValueError(f"layers: expected numbers below {len(sites)} ({role} attention), got {outside[0]}")
            sites = [site for site in sites if site.depth in layers]
        shapes: dict[tuple[int, int, int, int], list[int]] = {}
        for site, length in zip(sites, _lengths(role, len(sites), config), strict=True):
            shapes.setdefault((length, site.num_kv_heads, site.head_dim, site.value_head_dim), []).append(
                len(self.sites)
            )
            self.sites.append(site)
        for number, (shape, indices) in enumerate(shapes.items()):
            self.groups.append(PrefixGroup(f"{role}_{number}" if number else role, indices, *shape))

    def make_encoder(self, config: PrefixTuningConfig, device: torch.device) -> PrefixEncoder | nn.ModuleDict:
        """The module that holds the prefixes: a PrefixEncoder, or with several groups one for each, by name."""
        encoders = {group.name: _make_encoder(group, config, device) for group in self.groups}
        return next(iter(encoders.values())) if len(encoders) == 1 else nn.ModuleDict(encoders)

    def pairs(self, encoder: PrefixEncoder | nn.ModuleDict, stack: nn.Module) -> dict[int, PrefixPair]:
        """The prefixes of the attentions in ``stack``, by site. Evaluates each table that it needs once."""
        pairs: dict[int, PrefixPair] = {}
        for group in self.groups:
            if self.sites[group.sites[0]].stack is stack:
                pairs |= zip(group.sites, group.encoder_in(encoder)(), strict=True)
        return pairs


def _of_role(name: str, role: str, value: Any) -> Any:
    """Return ``value``, or its entry for ``role`` where it is a mapping."""
    if not isinstance(value, Mapping):
        return value
    if role not in value:
        raise ValueError(f"{name}: expected a value for {role!r}, got values for {sorted(value)}")
    return value[role]


def _lengths(role: str, count: int, config: PrefixTuningConfig) -> list[int]:
    lengths = _of_role("num_virtual_tokens", role, config.num_virtual_tokens)
    if isinstance(lengths, int):
        return [lengths] * count
    if len(lengths) != count:
        raise ValueError(
            f"num_virtual_tokens: expected one length for each of the {count} layers ({role} attention), "
            f"got {len(lengths)}"
        )
    return list(lengths)


def _make_encoder(group: PrefixGroup, config: PrefixTuningConfig, device: torch.device) -> PrefixEncoder:
    width = group.num_kv_heads * group.head_dim
    projection = config.prefix_projection and not config.inference_mode
    return PrefixEncoder(
        group.num_virtual_tokens,
        len(group.sites),
        group.num_kv_heads,
        group.head_dim,
        value_head_dim=group.value_head_dim,
        projection=projection,
        embedding_dim=width if projection else None,
        hidden_size=(config.encoder_hidden_size or width) if projection else None,
        num_frozen_tokens=config.num_frozen_tokens,
        dropout=config.prefix_dropout,
        init_std=config.init_std,
        device=device,
    )
