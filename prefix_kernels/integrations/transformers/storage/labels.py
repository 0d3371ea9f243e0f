"""The labels of a task, as a stored task keeps them and a model's config has them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from transformers import PreTrainedModel

from prefix_kernels._files import parse_json
from prefix_kernels.checkpoint import marked_heads

# The name of a stored task's labels in the metadata of its file.
LABELS_KEY = "labels"

# Some losses read the model's own copy of the number.
_NUM_LABELS = "num_labels"

# Those that Transformers has losses for; a config takes any string.
_ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"] | None

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
        """Read the labels that the heads of ``model`` tell apart; None where no layer of a head has an output for each.

        The config of every model has labels, of one that generates text too, where they mean nothing.
        """
        config = model.config
        layers = [layer for head in marked_heads(model).values() for layer in head.modules()]
        if not any(getattr(layer, "out_features", None) == len(config.id2label or {}) for layer in layers):
            return None
        # Transformers has made numbers of the numbers in the file of a config.
        names, numbers = cast("dict[int, str]", config.id2label), cast("dict[str, int]", config.label2id or {})
        return cls(dict(names), dict(numbers), config.problem_type)

    @classmethod
    def unnamed(cls, count: int) -> Labels:
        """``count`` labels, called as Transformers calls those without a name."""
        names = {i: f"LABEL_{i}" for i in range(count)}
        return cls(names, {name: i for i, name in names.items()})

    def give_to(self, model: PreTrainedModel) -> None:
        """Make them the labels of ``model``, whose config must be its own."""
        config = model.config
        config.id2label, config.label2id = dict(self.id2label), dict(self.label2id)
        config.problem_type = cast("_ProblemType", self.problem_type)
        if hasattr(model, _NUM_LABELS):
            setattr(model, _NUM_LABELS, len(self.id2label))

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
