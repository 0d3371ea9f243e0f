"""A call of the operator for each of its options, and its arguments in the order of the schema."""

import torch
from helpers import INPUT_NAMES, make_call

SAMPLES = {
    "full": {},
    "causal": {"is_causal": True, "dtype": torch.bfloat16},
    "no prefix": {"prefix_len": None, "is_causal": True},
    "prefix alone": {"k_len": 0},
    "offset": {"is_causal": True, "query_offset": 3, "window_size": (5, 2)},
    "offsets": {"is_causal": True, "query_offset": torch.tensor([3, 5])},
    "mask": {"attn_mask": torch.rand(2, 1, 1, 9) < 0.7, "softcap": 2.0},
    "additive mask": {"attn_mask": torch.randn(8, 14), "prefix_dtype": torch.bfloat16},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])},
    "value dim": {"value_dim": 24, "is_causal": True},
    "value dim below": {"value_dim": 3, "prefix_dtype": torch.bfloat16},
    "bank": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[0, 2], [-1, 1]]),
        "prefix_lens": torch.tensor([5, 0, 3]),
    },
}


def sample_call(name: str, **shape: object):
    shape = dict(q_heads=4, kv_heads=2, q_len=8, k_len=9, prefix_len=5, head_dim=8, layout="transposed") | shape
    return make_call(**shape | SAMPLES[name])


def operator_arguments(call) -> tuple:
    """The call as the registered operator's positional arguments."""
    options = {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "prefix_ids": None,
    } | call.options
    offset = options.get("query_offset")
    offsets, offset = (offset, None) if isinstance(offset, torch.Tensor) else (None, offset)
    left, right = options.get("window_size", (-1, -1))
    return (
        *(call.inputs[name] for name in INPUT_NAMES),
        options["attn_mask"],
        options["prefix_ids"],
        options.get("prefix_lens"),
        offsets,
        options.get("dropout_seed"),
        options["dropout_p"],
        options["is_causal"],
        options["scale"],
        offset,
        left,
        right,
        options.get("window_includes_prefix", False),
        options.get("softcap", 0.0),
    )
