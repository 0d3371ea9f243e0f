"""The heads of a task: what a model needs to pass from those of one task to those of another, of other sizes too.

Tasks tell different numbers of labels apart. Transformers' models make their heads and their losses from what their
config says of the labels, so labels are exchanged with the heads, and stored with them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.storage.labels import Labels, Shapes


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
