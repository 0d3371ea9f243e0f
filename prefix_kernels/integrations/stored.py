"""A stored task, whoever stored it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_kernels.checkpoint import load_prefix, read_prefix_metadata
from prefix_kernels.integrations.config import CONFIG_KEY, PrefixTuningConfig
from prefix_kernels.integrations.peft_checkpoint import is_peft_checkpoint, read_peft_checkpoint


@dataclass(frozen=True, eq=False)
class StoredTask:
    """What a file of ``save_prefix_model`` or a folder of PEFT's ``save_pretrained`` holds.

    Attributes:
        config: what a model has to be prepared with.
        source: the file, or the tensors of a folder of PEFT's.
    """

    config: PrefixTuningConfig
    source: str | os.PathLike | Mapping[str, Tensor]

    def load_into(self, model: nn.Module) -> None:
        """Load prefix and heads into a model that is prepared for them."""
        # PEFT converts what it loads to the dtype of the model.
        load_prefix(model, self.source, cast=isinstance(self.source, Mapping))


def read_stored_task(
    path: str | os.PathLike, model: PreTrainedModel, config: PrefixTuningConfig | None = None
) -> StoredTask:
    """Read what is needed to prepare ``model`` for the task at ``path``.

    Args:
        config: in place of the stored one.

    Raises:
        ValueError: neither such a file nor such a folder, or one that does not fit ``model``.
    """
    if is_peft_checkpoint(path):
        checkpoint = read_peft_checkpoint(path, model)
        return StoredTask(config or checkpoint.config, checkpoint.state)
    metadata = read_prefix_metadata(path)
    if config is None and CONFIG_KEY not in metadata:
        raise ValueError(f"{path}: expected a file of save_prefix_model, got one without a config; give config=")
    return StoredTask(config or PrefixTuningConfig.from_json(metadata[CONFIG_KEY]), path)
