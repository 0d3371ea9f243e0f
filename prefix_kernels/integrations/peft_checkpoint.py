"""The import path of 0.1.0 of :mod:`prefix_kernels.integrations.transformers.storage.peft_checkpoint`."""

from prefix_kernels.integrations.transformers.storage.peft_checkpoint import (  # noqa: F401
    PeftCheckpoint,
    is_peft_checkpoint,
    read_peft_checkpoint,
    save_peft_checkpoint,
)
