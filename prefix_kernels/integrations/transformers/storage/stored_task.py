"""A stored task, whoever stored it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_kernels._files import blaming, parse_json
from prefix_kernels.checkpoint import load_prefix, read_prefix_file, read_prefix_tensors, shape_misfits
from prefix_kernels.integrations.transformers.config import CONFIG_KEY, PrefixTuningConfig
from prefix_kernels.integrations.transformers.storage.labels import LABELS_KEY, Labels
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import (
    CONFIG_FILE,
    is_peft_checkpoint,
    read_peft_checkpoint,
)
from prefix_kernels.integrations.transformers.structure.routes import find_layout
from prefix_kernels.integrations.transformers.structure.support import check_transformers_model
from prefix_kernels.nn.encoder import PrefixEncoder

_PREFIX = "prefix_encoder"


@dataclass(frozen=True, eq=False)
class StoredTask:
    """A file of ``save_prefix_model`` or a folder of PEFT's ``save_pretrained``, checked against a model.

    Attributes:
        config: what a model has to be prepared with.
        source: the file, or the tensors of a folder of PEFT's.
        heads: the qualified names of its heads.
        labels: what they tell apart, if anything and if it is known; PEFT does not store it.
    """

    config: PrefixTuningConfig
    source: str | os.PathLike[str] | Mapping[str, Tensor]
    heads: Sequence[str]
    labels: Labels | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors, by qualified name."""
        if isinstance(self.source, Mapping):
            return {name: tuple(tensor.shape) for name, tensor in self.source.items()}
        return read_prefix_file(self.source).shapes

    def load_into(self, model: nn.Module) -> None:
        """Load prefix and heads into a model that is prepared for them."""
        # PEFT converts what it loads to the dtype of the model.
        load_prefix(model, self.source, cast=isinstance(self.source, Mapping))

    def prefix_encoder(self, model: PreTrainedModel) -> PrefixEncoder | nn.ModuleDict:
        """The stored prefix as a module of its own, on the CPU and in float32."""
        tensors = self.source if isinstance(self.source, Mapping) else read_prefix_tensors(self.source)
        state = {name: tensor for name, tensor in tensors.items() if _is_of_prefix(name)}
        encoder = find_layout(model, self.config).make_encoder(self.config, torch.device("cpu"))
        load_prefix(nn.ModuleDict({_PREFIX: encoder}), state, cast=True)
        return encoder


def read_stored_task(
    path: str | os.PathLike[str], model: PreTrainedModel, config: PrefixTuningConfig | None = None
) -> StoredTask:
    """Read what is needed to prepare ``model`` for the task at ``path``, and check that its prefix fits.

    Nothing is allocated for what the config asks for before it is known that the stored tensors have these shapes.

    Args:
        config: in place of the stored one.

    Raises:
        TypeError: ``model`` is not a Transformers model, or ``config`` no PrefixTuningConfig.
        ValueError: neither such a file nor such a folder, a damaged one, labels that its heads have no outputs for, or
            a prefix that does not fit ``model``; the message has the path, what was expected and what was found.
        FileNotFoundError: there is nothing at ``path``.
    """
    check_transformers_model(model)
    if config is not None:
        config = checked_config(config)
    task = _read_folder(path, model, config) if is_peft_checkpoint(path) else _read_file(path, config)
    shapes = {name: shape for name, shape in task.shapes().items() if _is_of_prefix(name)}
    if task.config.prefix_projection and all(name.endswith("table") for name in shapes):
        # Nothing in the file says how wide the MLP was that has generated this table.
        task = replace(task, config=replace(task.config, prefix_projection=False, encoder_hidden_size=None))
    with blaming(path):
        encoder = find_layout(model, task.config).make_encoder(task.config, torch.device("meta"))
    if problems := shape_misfits(str(path), nn.ModuleDict({_PREFIX: encoder}), shapes):
        lines = "\n  ".join(problems)
        raise ValueError(f"{path}: expected a prefix that fits {type(model).__name__}, got another:\n  {lines}")
    return task


def checked_config(config: PrefixTuningConfig) -> PrefixTuningConfig:
    """A copy, whose fields are checked as they are now.

    Raises:
        TypeError: not a PrefixTuningConfig; that of PEFT is another class.
        ValueError: a field that was changed to something the class refuses.
    """
    if not isinstance(config, PrefixTuningConfig):
        raise TypeError(
            f"config: expected a {PrefixTuningConfig.__module__}.PrefixTuningConfig, got a "
            f"{type(config).__module__}.{type(config).__name__}"
        )
    return replace(config)


def _read_folder(path: str | os.PathLike[str], model: PreTrainedModel, config: PrefixTuningConfig | None) -> StoredTask:
    checkpoint = read_peft_checkpoint(path, model)
    heads = checkpoint.config.modules_to_save or ()
    return StoredTask(config or checkpoint.config, checkpoint.state, heads, None)


def _read_file(path: str | os.PathLike[str], config: PrefixTuningConfig | None) -> StoredTask:
    if os.path.isdir(path):
        raise ValueError(
            f"{path}: expected a file of save_prefix_model, or a folder with PEFT's {CONFIG_FILE}, got a folder without"
        )
    file = read_prefix_file(path)
    if config is None and CONFIG_KEY not in file.metadata:
        raise ValueError(f"{path}: expected a file of save_prefix_model, got one without a config; give config=")
    if config is None:
        origin = f"{path}: {CONFIG_KEY}"
        values = parse_json(file.metadata[CONFIG_KEY], dict, origin)
        with blaming(origin):
            config = PrefixTuningConfig.from_dict(values)
    labels = None
    if LABELS_KEY in file.metadata:
        labels = Labels.from_json(file.metadata[LABELS_KEY], f"{path}: {LABELS_KEY}")
        labels.refuse_other_size(f"{path}: {LABELS_KEY}", file.heads, file.shapes)
    return StoredTask(config, path, file.heads, labels)


def _is_of_prefix(name: str) -> bool:
    return name.startswith(f"{_PREFIX}.")
