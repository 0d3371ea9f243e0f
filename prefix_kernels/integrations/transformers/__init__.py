"""Prefix tuning of Hugging Face Transformers models on the kernels of this package.

    from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model

    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    model = get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=20))
    Trainer(model, ...).train()
    save_prefix_model(model, "task.safetensors")

The model stays the object it was: ``Trainer``, ``generate``, ``save_pretrained`` and activation checkpointing work as
before. It gains a submodule ``prefix_encoder``, hooks, and an attention implementation registered through
Transformers' ``AttentionInterface``; no code of a model is replaced. The prefix is given to each attention call and
never enters a key/value cache.
"""

from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.initialization import (
    initialize_from_prefix,
    initialize_from_text,
    initialize_like_keys,
)
from prefix_kernels.integrations.transformers.model import (
    get_prefix_model,
    load_prefix_model,
    prefix_layers,
    remove_prefix,
    save_prefix_model,
)
from prefix_kernels.integrations.transformers.sharing import share_prefixes, unshare_prefixes
from prefix_kernels.integrations.transformers.tasks.api import (
    active_prefix,
    delete_named_prefix,
    get_named_prefix,
    load_named_prefix,
    prefix_names,
    select_prefixes,
    set_prefix,
    use_prefixes,
)

__all__ = [
    "PrefixTuningConfig",
    "active_prefix",
    "delete_named_prefix",
    "get_named_prefix",
    "get_prefix_model",
    "initialize_from_prefix",
    "initialize_from_text",
    "initialize_like_keys",
    "load_named_prefix",
    "load_prefix_model",
    "prefix_layers",
    "prefix_names",
    "remove_prefix",
    "save_prefix_model",
    "select_prefixes",
    "set_prefix",
    "share_prefixes",
    "unshare_prefixes",
    "use_prefixes",
]
