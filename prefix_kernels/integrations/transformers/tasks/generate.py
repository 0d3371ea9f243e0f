"""``model.generate`` of a prepared model: it takes ``prefix_names=`` too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.runtime.selection import (
    PrefixSelection,
    PrefixSource,
    RowNames,
    find_selection,
    selected,
)

if TYPE_CHECKING:
    from transformers import GenerationMixin


class SelectsForCalls(PrefixSource, Protocol):
    """A source that checks what a call of the whole model is given."""

    def selection_of(self, names: Sequence[RowNames] | PrefixSelection) -> PrefixSelection:
        """Return the selection that a call of the model with ``prefix_names=names`` means."""


class GenerateWithPrefixes:
    """``model.generate`` with one more argument, ``prefix_names=``; an object, so that it can be copied and pickled.

    It has one entry for each row of the inputs, which serves all beams and returned sequences of that row. The bank is
    made once, not for every token, unless FSDP2 shards the model.
    """

    def __init__(self, model: PreTrainedModel, tasks: SelectsForCalls) -> None:
        self.model = model
        self.tasks = tasks

    def __call__(
        self, *args: Any, prefix_names: Sequence[RowNames] | PrefixSelection | None = None, **kwargs: Any
    ) -> Any:
        generate = _generate_of(self.model)
        if prefix_names is None:
            selection = find_selection({}, self.tasks)
        else:
            selection = self.tasks.selection_of(prefix_names)
        if selection is None:
            return generate(self.model, *args, **kwargs)
        selection = selection.for_rows(_count_rows(self.model, args, kwargs))
        if _drops_rows(self.model, args, kwargs):
            selection = selection.for_any_rows()
        with torch.no_grad(), selected(selection.holding()):
            return generate(self.model, *args, **kwargs)


def _generate_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The ``generate`` of the class of ``model``, which is behind the one of the object."""
    return cast("type[GenerationMixin]", type(model)).generate


def _count_rows(model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of rows of the inputs of ``generate``, before it expands them; 1 where it begins from nothing."""
    outputs = kwargs.get("encoder_outputs")
    candidates = [
        args[0] if args else kwargs.get("inputs"),
        kwargs.get(model.main_input_name),
        kwargs.get("inputs_embeds"),
        None if outputs is None else outputs[0],
        # Without any of these, generate goes by the first tensor for the model: decoder_input_ids, a mask.
        *(value for name, value in kwargs.items() if not _is_setting(model, name)),
    ]
    return next((candidate.shape[0] for candidate in candidates if isinstance(candidate, Tensor)), 1)


def _is_setting(model: PreTrainedModel, name: str) -> bool:
    """Return True for an argument that ``generate`` does not hand on to the model."""
    return hasattr(model.generation_config, name) or name in inspect.signature(_generate_of(model)).parameters


def _drops_rows(model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return True where ``generate`` goes on with some rows of the batch when others are done.

    Whisper does, where speech is longer than the encoder takes at once, and where it tries one temperature after
    another.
    """
    if model.config.model_type != "whisper":
        return False
    config = kwargs.get("generation_config") or model.generation_config
    temperature = kwargs.get("temperature", config.temperature)
    if isinstance(temperature, Sequence) and len(temperature) > 1:
        return True
    features = args[0] if args else kwargs.get("input_features")
    encoder = model.get_encoder()
    stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]
    return features is not None and features.shape[-1] > stride * model.config.max_source_positions
