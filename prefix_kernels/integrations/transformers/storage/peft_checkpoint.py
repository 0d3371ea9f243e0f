"""Prefixes in the format in which PEFT stores them: reading and writing, without PEFT itself.

A checkpoint is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, which holds the prefix as
``prompt_embeddings`` (see :mod:`prefix_kernels.integrations.transformers.storage.peft_table`) and the modules trained
beside it, such as ``base_model.classifier.weight``. A projection has been folded into the prefix. The types
PREFIX_TUNING and CARTRIDGE store the same tensors.
"""

from __future__ import annotations

import inspect
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from prefix_kernels import fsdp
from prefix_kernels._files import LARGEST_SIZE, blaming, check_is_file, open_safetensors, parse_json, replacing
from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.storage.peft_table import (
    layers_of_cache,
    table_from_peft,
    table_to_peft,
)
from prefix_kernels.integrations.transformers.structure.attention_sites import (
    CROSS,
    DECODER,
    ENCODER,
    SELF,
    AttentionSite,
)
from prefix_kernels.integrations.transformers.structure.cached_attention import shares_cache_with_images
from prefix_kernels.integrations.transformers.structure.caches import CACHE_NAMES
from prefix_kernels.integrations.transformers.structure.prepared import encoder_of
from prefix_kernels.integrations.transformers.structure.routes import find_layout, prefix_sites
from prefix_kernels.integrations.transformers.structure.support import check_transformers_model
from prefix_kernels.integrations.transformers.structure.windows import has_sliding_window
from prefix_kernels.nn.encoder import PrefixEncoder

__all__ = ["PeftCheckpoint", "is_peft_checkpoint", "read_peft_checkpoint", "save_peft_checkpoint"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
_TABLE = "prompt_embeddings"
_MODEL = "base_model."

# PEFT's class for a task wraps the modules whose names end like this, and expects them in the checkpoint.
_HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
}
_CLASSES_OF_TASK = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
}


@dataclass(frozen=True, eq=False)
class PeftCheckpoint:
    """A checkpoint of PEFT as a model prepared by ``get_prefix_model`` holds it.

    Attributes:
        config: the settings with which the model gives PEFT's outputs.
        state: the prefix ``[P, 2 L, Hkv, D]``, frozen tokens and all, and the heads, by their names in the model.
    """

    config: PrefixTuningConfig
    state: dict[str, Tensor]


def is_peft_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Return True if ``path`` is a folder that PEFT wrote."""
    return os.path.isfile(Path(path) / CONFIG_FILE)


def read_peft_checkpoint(path: str | os.PathLike[str], model: PreTrainedModel) -> PeftCheckpoint:
    """Read a checkpoint of the type PREFIX_TUNING or CARTRIDGE that was trained for a model like ``model``.

    Args:
        path: the folder, as PEFT's ``save_pretrained`` wrote it; that of one adapter.
        model: a Transformers model, with or without a prefix.

    Raises:
        TypeError: ``model`` is not a Transformers model.
        ValueError: not such a folder, a damaged one, an adapter of another type, one that does not fit the model, or a
            model without support; of a folder, the message has the path, what was expected and what was found.
    """
    path = Path(path)
    check_transformers_model(model)
    settings = _read_config(path)
    tensors = _read_tensors(path)
    if _TABLE not in tensors:
        raise ValueError(f"{path}: expected a tensor {_TABLE!r}, got {sorted(tensors)}")
    prompt = tensors.pop(_TABLE)
    if not prompt.is_floating_point():
        raise ValueError(f"{path}: {_TABLE}: expected floating-point numbers, got {prompt.dtype}")

    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    submodules = settings["num_transformer_submodules"] or 1 + (settings["task_type"] == "SEQ_2_SEQ_LM")
    if submodules != 1 + is_encoder_decoder:
        raise ValueError(
            f"{path}: expected num_transformer_submodules={1 + is_encoder_decoder}, which PEFT uses for models like "
            f"{type(model).__name__}, got {submodules}"
        )
    sites = _sites_of_peft(model)
    heads, head_dim = sites[0].num_kv_heads, sites[0].head_dim
    num_pairs = _num_pairs(model, sites)
    width = 2 * num_pairs * heads * head_dim
    if prompt.dim() != 2 or prompt.shape[1] != width and not is_encoder_decoder:
        raise ValueError(
            f"{path}: {_TABLE}: expected [P, {width}] (a key and a value of {heads} heads of {head_dim} for each of "
            f"{num_pairs} layers), got {list(prompt.shape)}"
        )
    length = settings["num_virtual_tokens"]
    if length not in (None, prompt.shape[0]):
        raise ValueError(
            f"{path}: {CONFIG_FILE}: num_virtual_tokens: expected {prompt.shape[0]}, the rows of {_TABLE}, got {length}"
        )
    with blaming(path):
        layers = layers_of_cache(sites)
        table = table_from_peft(prompt, heads, head_dim, layers, is_encoder_decoder=is_encoder_decoder)
    state, modules_to_save = _read_heads(path, tensors, model, settings["modules_to_save"] or ())
    with blaming(path):
        config = PrefixTuningConfig(
            num_virtual_tokens=prompt.shape[0],
            num_frozen_tokens=settings["num_frozen_tokens"] or 0,
            modules_to_save=modules_to_save,
            target_attentions=(DECODER,) if is_encoder_decoder else None,
            position_offset="peft",
            window_includes_prefix=True,
        )
    return PeftCheckpoint(config, {"prefix_encoder.table": table.contiguous()} | state)


def save_peft_checkpoint(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    num_frozen_tokens: int | None = None,
) -> None:
    """Store the task that ``model`` was trained for as PEFT does; ``PeftModel.from_pretrained`` loads it.

    A projection is folded, as PEFT does it too. What only training needs (``prefix_dropout``) is not stored. Each of
    the two files replaces an older one only once both are written.

    Args:
        model: a model prepared by ``get_prefix_model``.
        path: the folder to write, made if there is none.
        task_type: PEFT's name of the task. Default: that of the model's class.
        num_frozen_tokens: store the type CARTRIDGE, of which PEFT keeps so many first tokens frozen. Default: the
            number in the model's config, or the type PREFIX_TUNING where that is 0.

    Raises:
        ValueError: ``model`` has no prefix, its parameters are divided among processes, PEFT has no task for it or
            cannot run a prefix on it, or it has settings that PEFT does not have; the message says which.
    """
    config = getattr(model, "prefix_tuning_config", None)
    if config is None:
        raise ValueError(f"model: expected a model prepared by get_prefix_model, got a plain {type(model).__name__}")
    if fsdp.units_of(model) or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            "model: expected one that this process holds whole, got one divided among processes (fully_shard, tp_plan);"
            " save_prefix_model stores its task, which load_prefix_model reads into a model that is whole"
        )
    task_type = _task_of(model) if task_type is None else task_type
    if task_type not in _HEADS_OF_TASK:
        raise ValueError(f"task_type: expected one of {', '.join(_HEADS_OF_TASK)}, got {task_type!r}")
    sites = _refuse_what_peft_lacks(model, config)
    length = config.prefix_lengths()[0]
    if num_frozen_tokens is None and config.num_frozen_tokens:
        num_frozen_tokens = config.num_frozen_tokens
    if num_frozen_tokens is not None and not 0 <= num_frozen_tokens <= length:
        raise ValueError(f"num_frozen_tokens: expected 0 to {length}, got {num_frozen_tokens}")

    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    num_pairs = model.config.num_hidden_layers if is_encoder_decoder else _num_pairs(model, sites)
    # PEFT has one stack alone, whose prefixes are of one shape and lie in one table.
    table = cast(PrefixEncoder, encoder_of(model)).full_table().detach()
    tensors = {_TABLE: table_to_peft(table, num_pairs, layers_of_cache(sites), is_encoder_decoder=is_encoder_decoder)}
    trained = [name for name, module in model.named_modules() if getattr(module, "trained_with_prefix", False)]
    modules_to_save = list(dict.fromkeys([*trained, *_HEADS_OF_TASK[task_type]]))
    for name, module in model.named_modules():
        if any(name.endswith(target) for target in modules_to_save):
            tensors |= {f"{_MODEL}{name}.{own}": tensor for own, tensor in module.state_dict().items()}

    heads, head_dim = sites[0].num_kv_heads, sites[0].head_dim
    settings = {
        "peft_type": "PREFIX_TUNING" if num_frozen_tokens is None else "CARTRIDGE",
        "task_type": task_type,
        "base_model_name_or_path": model.name_or_path or None,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1 + is_encoder_decoder,
        "num_layers": num_pairs,
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "modules_to_save": modules_to_save or None,
    }
    if num_frozen_tokens is not None:
        settings["num_frozen_tokens"] = num_frozen_tokens
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # The config, by which the folder is known, takes its place last.
    with replacing(path / CONFIG_FILE) as config_file, replacing(path / WEIGHTS_FILE) as weights_file:
        save_file(tensors, weights_file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(settings, indent=2) + "\n")


def _read_config(path: Path) -> dict[str, Any]:
    """The settings that are looked at, None where the file does not have one."""
    if not is_peft_checkpoint(path):
        raise ValueError(f"{path}: expected a folder of PEFT, with {CONFIG_FILE}, got none")
    origin = f"{path}: {CONFIG_FILE}"
    settings = parse_json((path / CONFIG_FILE).read_bytes(), dict, origin)
    if settings.get("peft_type") not in PREFIX_TYPES:
        raise ValueError(
            f"{path}: expected an adapter of the type {' or '.join(PREFIX_TYPES)}, got "
            f"{_excerpt(settings.get('peft_type'))}"
        )
    for name in ("num_virtual_tokens", "num_frozen_tokens", "num_transformer_submodules"):
        number = settings.setdefault(name, None)
        if number is not None and (type(number) is not int or not 0 <= number <= LARGEST_SIZE):
            raise ValueError(f"{origin}: {name}: expected an int of at least 0, or null, got {_excerpt(number)}")
    heads = settings.setdefault("modules_to_save", None)
    if heads is not None and not (isinstance(heads, list) and all(isinstance(name, str) for name in heads)):
        raise ValueError(f"{origin}: modules_to_save: expected an array of names, or null, got {_excerpt(heads)}")
    settings.setdefault("task_type", None)
    return settings


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if os.path.isfile(path / WEIGHTS_FILE):
        with open_safetensors(path / WEIGHTS_FILE, "the weights of an adapter") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if os.path.isfile(path / PICKLED_WEIGHTS_FILE):
        return _read_pickled_tensors(path / PICKLED_WEIGHTS_FILE)
    raise ValueError(f"{path}: expected {WEIGHTS_FILE} or {PICKLED_WEIGHTS_FILE} in it, got neither")


def _read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    check_is_file(path, "the weights of an adapter")
    try:
        # Mapped, so that what a file says of its sizes is not allocated before it is known to be there.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path}: expected tensors by name that torch.load can read, got others ({error})") from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path}: expected tensors by name, got a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: expected tensors by name, got {_excerpt(name)}: {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            raise ValueError(f"{path}: {name}: expected a dense tensor with its values, got another kind")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {name}: expected {tensor.nbytes} bytes for {list(tensor.shape)}, got "
                f"{tensor.untyped_storage().nbytes()}"
            )
    return dict(tensors)


def _excerpt(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 40 else reprlib.repr(value)


def _read_heads(
    path: Path, tensors: dict[str, Tensor], model: nn.Module, targets: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by their names in ``model``, and the modules that they belong to."""
    modules = {name for name, _ in model.named_modules() if any(name.endswith(target) for target in targets)}
    state: dict[str, Tensor] = {}
    heads: dict[str, None] = {}
    for stored_name, tensor in tensors.items():
        parts = stored_name.removeprefix(_MODEL).split(".")
        head = next((name for i in range(1, len(parts)) if (name := ".".join(parts[:i])) in modules), None)
        if head is None:
            raise ValueError(
                f"{path}: expected {_TABLE!r} and the modules that it names in modules_to_save, {list(targets)}, as "
                f"far as {type(model).__name__} has them, got {stored_name!r}"
            )
        heads[head] = None
        state[".".join(parts)] = tensor
    return state, list(heads)


def _sites_of_peft(model: PreTrainedModel) -> list[AttentionSite]:
    """The attentions to which PEFT gives a prefix."""
    is_encoder_decoder = model.config.is_encoder_decoder
    role, known = (DECODER, {ENCODER, DECODER, CROSS}) if is_encoder_decoder else (SELF, {SELF})
    if shares_cache_with_images(model):
        raise ValueError(
            f"{type(model).__name__}: expected prefixes in attentions to text alone, which PEFT also gives to those to "
            "images, as they share a key/value cache (accelerate runs such an adapter)"
        )
    sites = prefix_sites(model)
    if unknown := sorted({site.role for site in sites} - known):
        raise ValueError(
            f"{type(model).__name__}: expected a model of one stack or an encoder-decoder model, the two that PEFT "
            f"knows, got {unknown[0]} attention"
        )
    sites = [site for site in sites if site.role == role]
    if uneven := next((site for site in sites if site.value_head_dim != site.head_dim), None):
        raise ValueError(
            f"{type(model).__name__}: expected values of head dim {uneven.head_dim}, as the keys, because PEFT has one "
            f"for both, got {uneven.value_head_dim}"
        )
    shapes = {(site.num_kv_heads, site.head_dim) for site in sites}
    if len(shapes) > 1:
        raise ValueError(f"{type(model).__name__}: expected key/value heads of one shape, got {sorted(shapes)}")
    return sites


def _num_pairs(model: PreTrainedModel, sites: Sequence[AttentionSite]) -> int:
    """PEFT's ``num_layers`` for a model of one stack: all layers of its config, those without attention too."""
    layers: int = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    return max(layers, *(layer + 1 for layer in layers_of_cache(sites)))


def _refuse_what_peft_lacks(model: PreTrainedModel, config: PrefixTuningConfig) -> list[AttentionSite]:
    """The attentions with a prefix, if PEFT can say and run all of it."""
    name = type(model).__name__
    if config.position_offset != "peft":
        raise ValueError(
            f"position_offset: expected 'peft' (PEFT lets the positions of a sequence begin behind the prefix, another "
            f"model than the one that was trained), got {config.position_offset!r}"
        )
    expected = _sites_of_peft(model)
    layout = find_layout(model, config)
    roles = sorted({site.role for site in layout.sites})
    if roles != [expected[0].role]:
        raise ValueError(
            f"target_attentions: expected {[expected[0].role]}, the only kind of attention in {name} that PEFT gives a "
            f"prefix, got {roles}"
        )
    if [site.depth for site in layout.sites] != [site.depth for site in expected]:
        raise ValueError(
            f"layers: expected all {len(expected)} layers, as PEFT has no prefix for some of them, got "
            f"{[site.depth for site in layout.sites]}"
        )
    if not config.window_includes_prefix and has_sliding_window(model):
        raise ValueError(
            f"window_includes_prefix: expected True (in PEFT the prefix slides out of the window of {name}), got False"
        )
    if not any(set(CACHE_NAMES) & set(inspect.signature(m.forward).parameters) for m in (model, model.base_model)):
        raise ValueError(f"{name}: PEFT cannot run a prefix on it, because its forward takes no key/value cache")
    return expected


def _task_of(model: PreTrainedModel) -> str:
    for task_type, classes in _CLASSES_OF_TASK.items():
        if type(model).__name__ in classes.values():
            return task_type
    raise ValueError(
        f"{type(model).__name__}: expected a model for a task that PEFT has, {', '.join(_CLASSES_OF_TASK)}"
    )
