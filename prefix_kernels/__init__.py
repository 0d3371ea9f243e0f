"""Attention over ``[prefix ; sequence]`` keys and values without the concatenation, and what is built from it."""

from prefix_kernels._library import load as _load

_load()  # before anything imports torch: it says in one sentence what is wrong with the installation

from prefix_kernels._version import __version__  # noqa: E402
from prefix_kernels.backends.setting import attention_backend  # noqa: E402
from prefix_kernels.checkpoint import (  # noqa: E402
    load_prefix,
    mark_only_prefix_as_trainable,
    prefix_state_dict,
    read_prefix_metadata,
    save_prefix,
)
from prefix_kernels.functional import explain, prefix_attention  # noqa: E402
from prefix_kernels.merge import merge_attention  # noqa: E402
from prefix_kernels.nn import (  # noqa: E402
    PrefixEncoder,
    PrefixMultiheadAttention,
    PrefixTuningAttention,
    replace_multihead_attention,
    restore_multihead_attention,
)
from prefix_kernels.varlen import prefix_attention_varlen  # noqa: E402

__all__ = [
    "PrefixEncoder",
    "PrefixMultiheadAttention",
    "PrefixTuningAttention",
    "__version__",
    "attention_backend",
    "explain",
    "load_prefix",
    "mark_only_prefix_as_trainable",
    "merge_attention",
    "prefix_attention",
    "prefix_attention_varlen",
    "prefix_state_dict",
    "read_prefix_metadata",
    "replace_multihead_attention",
    "restore_multihead_attention",
    "save_prefix",
]
