"""Preparing a Transformers model for a prefix, undoing it, and storing and loading its task."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from prefix_kernels import fsdp
from prefix_kernels.checkpoint import mark_only_prefix_as_trainable, save_prefix
from prefix_kernels.integrations.transformers.attention.interface import register
from prefix_kernels.integrations.transformers.config import CONFIG_KEY, PrefixTuningConfig
from prefix_kernels.integrations.transformers.hooks.attach import install_hooks
from prefix_kernels.integrations.transformers.rollback import unchanged_on_error
from prefix_kernels.integrations.transformers.storage.labels import LABELS_KEY, Labels
from prefix_kernels.integrations.transformers.storage.stored_task import checked_config, read_stored_task
from prefix_kernels.integrations.transformers.structure.adapters import peft_adapter_parameters
from prefix_kernels.integrations.transformers.structure.offload import keep_loaded, running_device
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.integrations.transformers.structure.prepared import config_of, set_config
from prefix_kernels.integrations.transformers.structure.quantized import let_trainer_accept, refuse_quantized_heads
from prefix_kernels.integrations.transformers.structure.routes import find_layout, uses_cache
from prefix_kernels.integrations.transformers.structure.support import check_transformers_model, find_heads
from prefix_kernels.integrations.transformers.structure.tensor_parallel import split_over_heads
from prefix_kernels.integrations.transformers.tasks.registry import PrefixTasks
from prefix_kernels.integrations.transformers.tasks.state import PrefixState, is_prepared, state_of

__all__ = ["get_prefix_model", "load_prefix_model", "prefix_layers", "remove_prefix", "save_prefix_model"]

register()


def get_prefix_model(model: PreTrainedModel, config: PrefixTuningConfig | None = None) -> PreTrainedModel:
    """Prepare ``model``, in place, for training a prefix in every attention layer.

    Everything but the prefix and ``config.modules_to_save`` is frozen, and what PEFT has put into the layers and trains
    (LoRA) stays as it is. PEFT, called on a prepared model, freezes the prefix:
    ``model.prefix_encoder.requires_grad_(True)`` lets both be trained. The prefix is ``model.prefix_encoder``, in
    float32 whatever the model's dtype; ``model.prefix_tuning_config`` is the config. With equal prefixes and
    ``position_offset="peft"`` the outputs and the prefix gradients are those of PEFT's prefix tuning. The model gets a
    copy of its own config, so that another model built from the same config object is not affected.

    Weights that `accelerate` offloads (``cpu_offload``, ``disk_offload``, a ``device_map``) stay offloaded: the prefix
    is on the device where the attentions run, and the modules to save are loaded for good, as they are trained. Offload
    first: a prefix that is offloaded with its model is not trained. T5's table of relative positions has to stay
    frozen: the kernels form no gradient of a position bias, and a call that needs one raises a ValueError.

    Quantised weights (`torchao`, `bitsandbytes`) stay so. ``Trainer`` refuses models that are quantised and not PEFT's:
    ``model.is_quantized`` is False until the prefix is removed, where the quantisation lets gradients through.

    Args:
        model: a model with any head, whose attentions go through Transformers' ``AttentionInterface`` and are
            understood, or which takes a key/value cache (see ``attention`` of PrefixTuningConfig).
        config: default ``PrefixTuningConfig()``.

    Returns:
        ``model``. After an error it is as it was before.

    Raises:
        TypeError: ``model`` is not a Transformers model, or ``config`` no PrefixTuningConfig.
        ValueError: the model is not supported (the message says why), has a prefix already, is sharded by FSDP2
            already, lacks a module named in ``config.modules_to_save``, has offloaded weights tied to those of one, or
            has quantised weights in one.
    """
    config = PrefixTuningConfig() if config is None else checked_config(config)
    if is_prepared(model):
        raise ValueError(f"{type(model).__name__} has a prefix already; take it off with remove_prefix(model)")
    check_transformers_model(model)
    if fsdp.units_of(model):
        raise ValueError("model: expected one that is not sharded yet, got one of fully_shard; call that later")
    layout = find_layout(model, config)
    heads = find_heads(model) if config.modules_to_save is None else config.modules_to_save
    _check_names(model, heads)
    refuse_quantized_heads(model, heads)
    encoder = layout.make_encoder(config, running_device(model))
    split_over_heads(model, encoder, layout)
    with unchanged_on_error(model):
        _install(model, config, layout, encoder, heads)
    return model


def _install(
    model: PreTrainedModel, config: PrefixTuningConfig, layout: PrefixLayout, encoder: nn.Module, heads: Sequence[str]
) -> None:
    """Change ``model`` as :func:`get_prefix_model` does."""
    keep_loaded(model, heads)
    model.prefix_encoder = encoder.train(model.training)
    set_config(model, config)

    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters = [parameter for parameter in peft_adapter_parameters(model) if parameter.requires_grad]
    mark_only_prefix_as_trainable(model, also_train=heads)
    for parameter in adapters:
        parameter.requires_grad_(True)
    if config.inference_mode:
        model.requires_grad_(False)

    tasks = PrefixTasks(model, config, layout, takes_names=not uses_cache(model, config))
    handles = tasks.install()
    hooks = install_hooks(model, layout, config, tasks)
    PrefixState(tasks, handles, hooks, trained, let_trainer_accept(model)).install(model)


def remove_prefix(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`get_prefix_model`: no prefix, and the attention and trainable parameters from before.

    Trained heads keep their weights.

    Raises:
        ValueError: ``model`` has no prefix.
    """
    state = state_of(model)
    state.remove(model)
    del model.prefix_encoder, model.prefix_tuning_config
    for name, parameter in model.named_parameters():
        # Names have changed where PEFT has put adapters into layers since.
        parameter.requires_grad_(state.trained.get(name, parameter.requires_grad))
    return model


def prefix_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the attention modules that have a prefix, in the order in which they are called.

    Layers without attention, as hybrid models have them, run as they are. A layer that is called several times is named
    once for each call.

    Raises:
        ValueError: ``model`` has no prefix.
    """
    names = {module: name for name, module in model.named_modules()}
    return [names[site.module] for site in state_of(model).tasks.layout.sites]


def save_prefix_model(model: PreTrainedModel, path: str | os.PathLike[str], *, fold: bool = True) -> None:
    """Store the task that ``model`` was trained for as one safetensors file: prefix, heads and their labels, config.

    Args:
        model: a model prepared by :func:`get_prefix_model`.
        path: the file to write.
        fold: store the prefix that a projection generates in place of the projection.

    Raises:
        ValueError: ``model`` has no prefix.
    """
    state_of(model)
    config = config_of(model)
    if fold and config.prefix_projection:
        config = PrefixTuningConfig.from_dict(
            config.to_dict() | {"prefix_projection": False, "encoder_hidden_size": None}
        )
    metadata = {CONFIG_KEY: config.to_json()}
    if (labels := Labels.of(model)) is not None:
        metadata[LABELS_KEY] = labels.to_json()
    save_prefix(model, path, fold=fold, metadata=metadata)


def load_prefix_model(
    model: PreTrainedModel, path: str | os.PathLike[str], *, config: PrefixTuningConfig | None = None
) -> PreTrainedModel:
    """Prepare a fresh ``model`` for the task stored by :func:`save_prefix_model` or by PEFT, and load it.

    Where the heads tell labels apart, ``model.config`` gets the stored names and ``problem_type``; PEFT stores none.

    Args:
        model: a model of the same shape as the one that was trained, without a prefix.
        path: the stored file, or the folder that PEFT's ``save_pretrained`` wrote for an adapter of the type
            PREFIX_TUNING or CARTRIDGE; then the outputs are PEFT's.
        config: default: the stored one. Give one to choose another ``attention`` or ``inference_mode``.

    Returns:
        ``model``. After an error it is as it was before.

    Raises:
        TypeError: ``model`` is not a Transformers model, or ``config`` no PrefixTuningConfig.
        ValueError: the file was not written by :func:`save_prefix_model`, the folder holds an adapter of another type,
            one of them is damaged, or it does not fit the model; the message has the path, what was expected and what
            was found. What a config asks for is compared with the stored tensors before it is allocated.
        FileNotFoundError: there is nothing at ``path``.
    """
    task = read_stored_task(path, model, config)
    with unchanged_on_error(model):
        get_prefix_model(model, task.config)
        if task.labels is not None:
            task.labels.give_to(model)
        # Last, because what it writes is not taken back; it writes nothing unless all of it fits.
        task.load_into(model)
    return model


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(getattr(model, name, None), nn.Module):
            raise ValueError(
                f"modules_to_save: expected names among {[n for n, _ in model.named_children()]}, got {name!r}"
            )
