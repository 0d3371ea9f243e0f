"""The heads of a task: what a model needs to pass from those of one task to those of another, of other sizes too.

Tasks tell different numbers of labels apart. Transformers' models make their heads and their losses from what their
config says of the labels, so labels are exchanged with the heads, and stored with them.
"""

from __future__ import annotations

import copy
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_kernels._files import parse_json
from prefix_kernels.checkpoint import marked_heads

# What a stored task calls its labels in the metadata of its file.
LABELS_KEY = "labels"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a task as a model's config has them.

    Attributes:
        id2label: the name of each.
        label2id: the number of each.
        problem_type: which loss they are trained with; None: the model's first loss decides by the labels it is given.
    """

    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Labels | None:
        """Those that the heads of ``model`` tell apart now; None where no layer of a head has an output for each.

        The config of every model has labels, of one that generates text too, where they mean nothing.
        """
        config = model.config
        layers = [layer for head in marked_heads(model).values() for layer in head.modules()]
        if not any(getattr(layer, "out_features", None) == len(config.id2label or {}) for layer in layers):
            return None
        return cls(dict(config.id2label), dict(config.label2id or {}), config.problem_type)

    @classmethod
    def unnamed(cls, count: int) -> Labels:
        """``count`` labels, called as Transformers calls those without a name."""
        names = {i: f"LABEL_{i}" for i in range(count)}
        return cls(names, {name: i for i, name in names.items()})

    def give_to(self, model: PreTrainedModel) -> None:
        """Make them the labels of ``model``, whose config must be its own."""
        config = model.config
        config.id2label, config.label2id = dict(self.id2label), dict(self.label2id)
        config.problem_type = self.problem_type
        # Some losses read the model's own copy of the number.
        if hasattr(model, "num_labels"):
            model.num_labels = len(self.id2label)

    def to_json(self) -> str:
        """One line of JSON; names that are no strings become strings."""
        names = {int(i): str(name) for i, name in self.id2label.items()}
        numbers = {str(name): int(i) for name, i in self.label2id.items()}
        return json.dumps({"id2label": names, "label2id": numbers, "problem_type": self.problem_type})

    @classmethod
    def from_json(cls, text: str, origin: str = LABELS_KEY) -> Labels:
        """The inverse of :meth:`to_json`.

        Args:
            origin: where the text is from, for messages.

        Raises:
            ValueError: no JSON, or not of labels.
        """
        values = parse_json(text, dict, origin)
        fields = ["id2label", "label2id", "problem_type"]
        if sorted(values) != fields:
            raise ValueError(f"{origin}: expected the fields {fields}, got {reprlib.repr(sorted(values))}")
        names, numbers, problem_type = (values[field] for field in fields)
        if not isinstance(names, dict) or not all(
            i.isascii() and i.isdecimal() and len(i) < 10 and isinstance(name, str) for i, name in names.items()
        ):
            raise ValueError(f"{origin}: id2label: expected an object of names by number, got {reprlib.repr(names)}")
        if not isinstance(numbers, dict) or not all(type(i) is int for i in numbers.values()):
            raise ValueError(f"{origin}: label2id: expected an object of numbers by name, got {reprlib.repr(numbers)}")
        if problem_type is not None and not isinstance(problem_type, str):
            raise ValueError(f"{origin}: problem_type: expected a string or null, got {reprlib.repr(problem_type)}")
        return cls({int(i): name for i, name in names.items()}, numbers, problem_type)

    def refuse_other_size(self, origin: str, heads: Sequence[str], stored: Shapes) -> None:
        """Raise where no stored layer of ``heads`` has an output for each label: the loss would fail.

        Args:
            origin: where labels and heads are from, for the message.
            heads: the qualified names of the heads.
            stored: the shapes of the stored tensors, by qualified name.

        Raises:
            ValueError: the message has the number of labels and the numbers of outputs.
        """
        rows = {
            name: shape[0]
            for name, shape in stored.items()
            if shape and any(name.startswith(f"{head}.") for head in heads)
        }
        if len(self.id2label) not in rows.values():
            raise ValueError(
                f"{origin}: expected a head with an output for each of the {len(self.id2label)} labels, got "
                f"{', '.join(f'{name} with {count}' for name, count in sorted(rows.items())) or 'none'}"
            )


def fitted_heads(heads: Mapping[str, nn.Module], stored: Shapes) -> dict[str, nn.Module]:
    """Copies of ``heads`` whose linear layers have as many outputs as the stored ones.

    Args:
        heads: by qualified name.
        stored: the shapes of the stored tensors, by qualified name.

    Returns:
        The copies; a layer of another size has values that are to be overwritten.
    """
    fitted = copy.deepcopy(dict(heads))
    for layer_name, layer in _linear_layers(fitted):
        outputs, *inputs = stored.get(f"{layer_name}.weight") or layer.weight.shape
        if inputs == [layer.in_features] and outputs != layer.out_features:
            layer.out_features = outputs
            for name, parameter in list(layer.named_parameters()):
                resized = parameter.new_empty(outputs, *parameter.shape[1:])
                setattr(layer, name, nn.Parameter(resized, parameter.requires_grad))
    return fitted


def labels_of_size(heads: Mapping[str, nn.Module], fitted: Mapping[str, nn.Module], labels: Labels) -> Labels:
    """``labels``, or unnamed ones where layers of ``heads`` with an output for each have more or fewer in ``fitted``.

    Raises:
        ValueError: they have become several of different sizes.
    """
    sizes = {
        new.out_features
        for (_, old), (_, new) in zip(_linear_layers(heads), _linear_layers(fitted), strict=True)
        if old.out_features == len(labels.id2label) != new.out_features
    }
    if len(sizes) > 1:
        raise ValueError(f"heads: expected one number of labels, got layers with {sorted(sizes)} outputs")
    return Labels.unnamed(sizes.pop()) if sizes else labels


def refuse_unequal_heads(
    active: str, ours: Mapping[str, nn.Module], other: str, theirs: Mapping[str, nn.Module]
) -> None:
    """Raise where the heads of the task ``other`` are not those of the active one.

    Raises:
        ValueError: the message names the head.
    """
    for head_name, head in theirs.items():
        state = _tensors(ours[head_name])
        for key, tensor in _tensors(head).items():
            if torch.equal(state[key], tensor.to(state[key])):
                continue
            sizes = ""
            if state[key].shape != tensor.shape:
                sizes = f" ({key} {list(tensor.shape)} instead of {list(state[key].shape)})"
            raise ValueError(
                f"prefix_names: {other!r} has another {head_name!r} than the active task {active!r}{sizes}, and a "
                f"batch passes through one: expected tasks with equal heads; set_prefix(model, {other!r}) switches "
                "them for a batch of its own, and the model below the head mixes all tasks"
            )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    # Not state_dict(), for which FSDP2 takes back the parameters that it has gathered for the pass under way.
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _linear_layers(heads: Mapping[str, nn.Module]) -> list[tuple[str, nn.Linear]]:
    """The linear layers in ``heads``, by qualified name; not those of other classes that derive from them."""
    return [
        (f"{head_name}.{name}" if name else head_name, module)
        for head_name, head in heads.items()
        for name, module in head.named_modules()
        if type(module) is nn.Linear
    ]
