"""The part of PEFT's prefix table that each layer of a model reads.

PEFT stores a prefix as ``prompt_embeddings [P, 2 * L * Hkv * D]``: ``L`` pairs of a key and a value slice, each
``[P, Hkv, D]``. In a model of one stack, layer ``l`` reads pair ``l``. In an encoder-decoder model PEFT doubles the
table, hands each decoder layer four slices in turn, and then drops those that were meant for cross-attention. What is
left is a prefix for the decoder's self-attention, whose layer ``l`` reads pair ``2 l mod L``: with an even ``L`` every
second pair is read by two layers and the others by none. ``L`` is the depth of the encoder, so that a deeper decoder
finds no slices for its last layers (PEFT raises an IndexError).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairs_of_layers(num_pairs: int, num_layers: int, *, is_encoder_decoder: bool = False) -> list[int]:
    """The pair of PEFT's table that each layer reads.

    Args:
        num_pairs: ``L``, PEFT's ``num_layers``.
        num_layers: the number of layers with a prefix: of the model, or in an encoder-decoder model of its decoder.
        is_encoder_decoder: PEFT's ``num_transformer_submodules == 2``.

    Returns:
        ``num_layers`` indices below ``num_pairs``.

    Raises:
        ValueError: there are more layers than pairs; PEFT cannot run such a model.
    """
    if num_layers > num_pairs:
        raise ValueError(f"num_layers: expected at most {num_pairs}, the layers of PEFT's prefix, got {num_layers}")
    return [2 * layer % num_pairs if is_encoder_decoder else layer for layer in range(num_layers)]


def table_from_peft(
    prompt_embeddings: Tensor,
    num_kv_heads: int,
    head_dim: int,
    num_layers: int | None = None,
    *,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """The table of a :class:`prefix_kernels.PrefixEncoder` that gives every layer what PEFT gives it.

    Args:
        prompt_embeddings: ``[P, 2 * L * Hkv * D]``.
        num_kv_heads: ``Hkv``.
        head_dim: ``D``.
        num_layers: the number of layers with a prefix. Default: ``L``.
        is_encoder_decoder: as in :func:`pairs_of_layers`.

    Returns:
        ``[P, 2 * num_layers, Hkv, D]``, differentiable with respect to ``prompt_embeddings``.

    Raises:
        ValueError: the width is no multiple of ``2 * Hkv * D``, or there are more layers than pairs.
    """
    num_pairs, rest = divmod(prompt_embeddings.shape[1], 2 * num_kv_heads * head_dim)
    if rest:
        raise ValueError(
            f"prompt_embeddings: expected a width that is a multiple of {2 * num_kv_heads * head_dim} (a key and a "
            f"value of {num_kv_heads} heads of {head_dim}), got {prompt_embeddings.shape[1]}"
        )
    pairs = pairs_of_layers(
        num_pairs, num_pairs if num_layers is None else num_layers, is_encoder_decoder=is_encoder_decoder
    )
    slices = prompt_embeddings.view(-1, num_pairs, 2, num_kv_heads, head_dim)
    return slices[:, pairs].flatten(1, 2)


def table_to_peft(table: Tensor, num_pairs: int | None = None, *, is_encoder_decoder: bool = False) -> Tensor:
    """The inverse of :func:`table_from_peft`. Pairs that no layer reads are zero.

    Args:
        table: ``[P, 2 * num_layers, Hkv, D]``.
        num_pairs: ``L``. Default: ``num_layers``.
        is_encoder_decoder: as in :func:`pairs_of_layers`.

    Returns:
        ``[P, 2 * L * Hkv * D]``.

    Raises:
        ValueError: there are more layers than pairs, or layers that share a pair in PEFT differ.
    """
    num_layers = table.shape[1] // 2
    num_pairs = num_layers if num_pairs is None else num_pairs
    pairs = pairs_of_layers(num_pairs, num_layers, is_encoder_decoder=is_encoder_decoder)
    layers: Tensor = table.unflatten(1, (num_layers, 2))
    slices = layers.new_zeros(layers.shape[0], num_pairs, *layers.shape[2:])
    slices[:, pairs] = layers
    for layer, pair in enumerate(pairs):
        if not torch.equal(slices[:, pair], layers[:, layer]):
            raise ValueError(
                f"table: PEFT gives layers {[i for i, other in enumerate(pairs) if other == pair]} of this "
                "encoder-decoder model one prefix, expected them to be equal, got different ones"
            )
    return slices.flatten(1)
