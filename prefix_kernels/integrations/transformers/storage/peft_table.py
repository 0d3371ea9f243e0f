"""The part of PEFT's prefix table that each layer of a model reads.

PEFT stores a prefix as ``prompt_embeddings [P, 2 * L * Hkv * D]``: ``L`` pairs of a key and a value slice, each ``[P,
Hkv, D]``. PEFT fills a key/value cache with them: in a model of one stack, the layer ``l`` of the cache gets pair
``l``. In an encoder-decoder model PEFT doubles the table, hands each decoder layer four slices in turn, and then drops
those that were meant for cross-attention. What is left is a prefix for the decoder's self-attention, whose layer ``l``
reads pair ``2 l mod L``: with an even ``L`` every second pair is read by two layers and the others by none. ``L`` is
the depth of the encoder, so that a deeper decoder finds no slices for its last layers (PEFT raises an IndexError).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefix_kernels.integrations.transformers.structure.attention_sites import AttentionSite


def layers_of_cache(sites: Sequence[AttentionSite]) -> list[int]:
    """The numbers of the cache's layers into which PEFT puts the prefixes of ``sites``."""
    return [site.depth if site.cache_layer is None else site.cache_layer for site in sites]


def pairs_of_layers(num_pairs: int, layers: Sequence[int], *, is_encoder_decoder: bool = False) -> list[int]:
    """The pair of PEFT's table that each layer of a cache gets.

    Args:
        num_pairs: ``L``, PEFT's ``num_layers``.
        layers: numbers of layers of the cache: of the model, or in an encoder-decoder model of its decoder.
        is_encoder_decoder: PEFT's ``num_transformer_submodules == 2``.

    Returns:
        An index below ``num_pairs`` for each of ``layers``.

    Raises:
        ValueError: there are more layers than pairs; PEFT cannot run such a model.
    """
    if max(layers) >= num_pairs:
        raise ValueError(
            f"num_layers: expected at most {num_pairs}, the layers of PEFT's prefix, got {max(layers) + 1}"
        )
    return [2 * layer % num_pairs if is_encoder_decoder else layer for layer in layers]


def table_from_peft(
    prompt_embeddings: Tensor,
    num_kv_heads: int,
    head_dim: int,
    layers: Sequence[int] | None = None,
    *,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """The table of a :class:`prefix_kernels.PrefixEncoder` that gives every layer what PEFT gives it.

    Args:
        prompt_embeddings: ``[P, 2 * L * Hkv * D]``.
        num_kv_heads: ``Hkv``.
        head_dim: ``D``.
        layers: the layer of the cache that each attention reads. Default: ``range(L)``.
        is_encoder_decoder: as in :func:`pairs_of_layers`.

    Returns:
        ``[P, 2 * len(layers), Hkv, D]``, differentiable with respect to ``prompt_embeddings``.

    Raises:
        ValueError: the width is no multiple of ``2 * Hkv * D``, or there are more layers than pairs.
    """
    num_pairs, rest = divmod(prompt_embeddings.shape[1], 2 * num_kv_heads * head_dim)
    if rest:
        raise ValueError(
            f"prompt_embeddings: expected a width that is a multiple of {2 * num_kv_heads * head_dim} (a key and a "
            f"value of {num_kv_heads} heads of {head_dim}), got {prompt_embeddings.shape[1]}"
        )
    layers = range(num_pairs) if layers is None else layers
    pairs = pairs_of_layers(num_pairs, layers, is_encoder_decoder=is_encoder_decoder)
    slices = prompt_embeddings.view(-1, num_pairs, 2, num_kv_heads, head_dim)
    return slices[:, pairs].flatten(1, 2)


def table_to_peft(table: Tensor, num_pairs: int, layers: Sequence[int], *, is_encoder_decoder: bool = False) -> Tensor:
    """The inverse of :func:`table_from_peft`. Pairs that no attention reads are zero.

    Args:
        table: ``[P, 2 * len(layers), Hkv, D]``.
        num_pairs: ``L``.
        layers: as in :func:`table_from_peft`.
        is_encoder_decoder: as in :func:`pairs_of_layers`.

    Returns:
        ``[P, 2 * L * Hkv * D]``.

    Raises:
        ValueError: there are more layers than pairs, or attentions that share a pair in PEFT differ.
    """
    pairs = pairs_of_layers(num_pairs, layers, is_encoder_decoder=is_encoder_decoder)
    attentions: Tensor = table.unflatten(1, (len(layers), 2))
    slices = attentions.new_zeros(attentions.shape[0], num_pairs, *attentions.shape[2:])
    slices[:, pairs] = attentions
    for number, pair in enumerate(pairs):
        if not torch.equal(slices[:, pair], attentions[:, number]):
            sharing = [i for i, other in enumerate(pairs) if other == pair]
            raise ValueError(
                f"table: PEFT gives layers {sharing} of this model one prefix, expected them to be equal, got "
                "different ones"
            )
    return slices.flatten(1)
