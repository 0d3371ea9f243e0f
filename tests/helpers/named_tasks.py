"""Three tasks of different lengths on one model, and what each row of a batch must give."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_models import prepared
from torch import Tensor
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers import load_named_prefix, load_prefix_model, save_prefix_model

# "default" is what the first is called.
TASKS = {
    "default": {"num_virtual_tokens": 5},
    "short": {"num_virtual_tokens": 2},
    "unmoved": {"num_virtual_tokens": 7, "position_offset": "none"},
}
NAMES = ["short", None, "unmoved"]


class Tasks:
    """A base model, a model with each task alone, and one model with all of them."""

    def __init__(self, folder: Path, base: PreTrainedModel, **settings: object) -> None:
        self.folder, self.base = folder, base
        self.alone = {}
        for name, own in TASKS.items():
            self.alone[name] = prepared(base, **settings, **own)
            save_prefix_model(self.alone[name], self.path(name))
        self.model = load_prefix_model(copy.deepcopy(base), self.path("default"))
        for name in list(TASKS)[1:]:
            load_named_prefix(self.model, name, self.path(name))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def of(self, name: str | None) -> PreTrainedModel:
        return self.base if name is None else self.alone[name]


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: tensor[i : i + 1] for name, tensor in inputs.items()}


def row_by_row(tasks: Tasks, names: Sequence[str | None], inputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([tasks.of(name)(**row(inputs, i)).logits for i, name in enumerate(names)])
