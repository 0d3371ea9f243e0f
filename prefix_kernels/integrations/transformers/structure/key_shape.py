"""The shape of the keys and values of an attention module."""

from __future__ import annotations

from typing import Any

from torch import nn

from prefix_kernels.functional import MAX_HEAD_DIM


def key_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Read ``(Hkv, D, Dv)`` from an attention module whose keys and values the kernels are to take.

    Args:
        name: the module's name in error messages.

    Raises:
        ValueError: a head dim is larger than the kernels take, or the module chooses the keys of each query by itself.
    """
    if isinstance(getattr(module, "indexer", None), nn.Module):
        raise ValueError(f"{name}: expected attention to all visible keys, got one that chooses them by an indexer")
    num_kv_heads, head_dim, value_head_dim = read_key_shape(module)
    for size in (head_dim, value_head_dim):
        if size > MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head dim of at most {MAX_HEAD_DIM}, got {size}")
    return num_kv_heads, head_dim, value_head_dim


def read_key_shape(module: nn.Module) -> tuple[int, int, int]:
    """Read ``(Hkv, D, Dv)``, the number of key/value heads and the head dims of both, from an attention module."""
    head_dim = _head_dim(module)
    num_kv_heads = _num_kv_heads(module, head_dim)
    return num_kv_heads, head_dim, _value_head_dim(module, head_dim, num_kv_heads)


def module_config(module: nn.Module) -> Any:
    """The config of ``module``; which attributes it has depends on the model type."""
    return module.config


def _is_latent(module: nn.Module) -> bool:
    """Return True for multi-head latent attention, which expands its latents to keys of every query head."""
    return isinstance(getattr(module, "kv_lora_rank", None), int) and isinstance(
        getattr(module, "qk_rope_head_dim", None), int
    )


def _num_kv_heads(module: nn.Module, head_dim: int) -> int:
    if _is_latent(module):
        return int(module_config(module).num_attention_heads)
    # The layers of one model may differ; their projections know.
    width = getattr(getattr(module, "k_proj", None), "out_features", None)
    if isinstance(width, int) and width % head_dim == 0:
        return width // head_dim
    if isinstance(count := getattr(module, "num_kv_heads", None), int):
        return count
    kv_heads: int | None = getattr(getattr(module, "config", None), "num_key_value_heads", None)
    if kv_heads is not None:
        return kv_heads
    for attribute in ("num_heads", "n_heads", "num_attention_heads", "num_attn_heads"):
        if isinstance(count := getattr(module, attribute, None), int):
            return count
    heads: int = module_config(module).num_attention_heads
    return heads


def _head_dim(module: nn.Module) -> int:
    if _is_latent(module):
        config = module_config(module)
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    for attribute in ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size"):
        if isinstance(size := getattr(module, attribute, None), int):
            return size
    config = module_config(module)
    head_dim: int = config.hidden_size // config.num_attention_heads
    return head_dim


def _value_head_dim(module: nn.Module, head_dim: int, num_kv_heads: int) -> int:
    if isinstance(size := getattr(module, "v_head_dim", None), int):
        return size
    width = getattr(getattr(module, "v_proj", None), "out_features", None)
    if isinstance(width, int) and width % num_kv_heads == 0:
        return width // num_kv_heads
    return head_dim
