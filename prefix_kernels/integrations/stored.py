"""A stored task, whoever stored it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_kernels.checkpoint import load_prefix, read_prefix_metadata
from prefix_kernels.integrations.config import CONFIG_KEY, PrefixTuningConfig
from prefix_kernels.integrations.heads import LABELS_KEY, Labels
from prefix_kernels.integrations.peft_checkpoint import is_peft_checkpoint, read_peft_checkpoint


@dataclass(frozen=True, eq=False)
class StoredTask:
    """What a file of ``save_prefix_model`` or a folder of PEFT's ``save_pretrained`` holds.

    Attributes:
        config: what a model has to be prepared with.
        source: the file, or the tensors of a folder of PEFT's.
        heads: the qualified names of its heads.
        labels: what they tell apart, if anything and if it is known; PEFT does not store it.
    """

    config: PrefixTuningConfig
    source: str | os.PathLike | Mapping[str, Tensor]
    heads: Sequence[str]
    labels: Labels | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors, by qualified name."""
        if isinstance(self.source, Mapping):
            return {name: tuple(tensor.shape) for name, tensor in self.source.items()}
        with safe_open(self.source, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)

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
        return StoredTask(config or checkpoint.config, checkpoint.state, checkpoint.config.modules_to_save, None)
    metadata = read_prefix_metadata(path)
    if config is None and CONFIG_KEY not in metadata:
        raise ValueError(f"{path}: expected a file of save_prefix_model, got one without a config; give config=")
    heads = json.loads(metadata.get("heads", "[]"))
    labels = Labels.from_json(metadata[LABELS_KEY]) if LABELS_KEY in metadata else None
    return StoredTask(config or PrefixTuningConfig.from_json(metadata[CONFIG_KEY]), path, heads, labels)
