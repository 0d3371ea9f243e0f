"""Prefix tuning of PEFT on the kernels of this package, in one line.

    from prefix_kernels.integrations.peft import accelerate

    model = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20))
    model = accelerate(model)

How it works
------------
PEFT's ``forward`` repeats the prefix for every row of the batch, puts it into a key/value cache, lengthens the
attention mask and calls the model below. An accelerated model is of a subclass of its PEFT class whose ``forward``
and ``generate`` call the model below as it is; there, hooks hand the prompt encoder's prefix to the attention and move
the positions, as in :func:`prefix_kernels.integrations.transformers.get_prefix_model`. A subclass, because PEFT builds
its cache inside its own methods: a hook on the model below would come too late to save the copies, and would have to
tell the cache and the mask that PEFT made from those of the user. Everything else is PEFT's: parameters, adapters,
``save_pretrained``. The hooks act only while an accelerated model runs, so that the base model called by itself is
without a prefix, as in PEFT.

Loading and writing PEFT's checkpoints, which does not need PEFT, is in
:mod:`prefix_kernels.integrations.transformers.storage.peft_checkpoint`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

try:
    from peft import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
except ImportError as error:
    raise ImportError(
        f"{__name__} needs PEFT 0.21 or newer, which could not be imported ({error}); its checkpoints can be read and "
        "written without it: prefix_kernels.integrations.transformers.storage.peft_checkpoint"
    ) from error

from prefix_kernels import fsdp
from prefix_kernels.integrations.transformers.attention.interface import register
from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.hooks.attach import PrefixHooks, install_hooks
from prefix_kernels.integrations.transformers.rollback import unchanged_on_error
from prefix_kernels.integrations.transformers.runtime.bank import PrefixBank
from prefix_kernels.integrations.transformers.runtime.call_context import CallContext
from prefix_kernels.integrations.transformers.runtime.call_prefixes import SITE_ATTRIBUTE
from prefix_kernels.integrations.transformers.runtime.selection import PREFIX_NAMES, PrefixSelection, RowNames
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import PREFIX_TYPES
from prefix_kernels.integrations.transformers.storage.peft_table import layers_of_cache, pairs_of_layers
from prefix_kernels.integrations.transformers.structure.attention_sites import DECODER
from prefix_kernels.integrations.transformers.structure.cached_attention import (
    find_cached_sites,
    shares_cache_with_images,
)
from prefix_kernels.integrations.transformers.structure.key_shape import module_config
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout, PrefixPair
from prefix_kernels.integrations.transformers.structure.routes import CACHE, find_layout
from prefix_kernels.integrations.transformers.structure.tensor_parallel import is_tensor_parallel

__all__ = ["accelerate", "restore"]

_ADAPTERS = "_prefix_kernels_adapters"
_ONE_ADAPTER = (
    "PEFT's prefix tuning has one active adapter for all rows of a batch (load_prefix_model reads its checkpoints into "
    "a model whose rows may differ)"
)

register()


def accelerate(peft_model: PeftModel) -> PeftModel:
    """Run a PEFT prefix-tuning model, in place, on the kernels of this package.

    Logits, losses, gradients and generated tokens are PEFT's. The parameters stay the same objects, so that an
    optimizer made before goes on; ``save_pretrained``, ``set_adapter``, ``load_adapter``, ``disable_adapter`` and
    ``Trainer`` work as before. The prefix is not repeated for the rows of a batch and does not enter key/value caches,
    which therefore hold the sequence alone. Activation checkpointing, with which PEFT refuses to work or silently
    trains without the prefix, works if it is enabled after ``get_peft_model``.

    Args:
        peft_model: a model with adapters of the type PREFIX_TUNING (with or without ``prefix_projection``) or
            CARTRIDGE, being trained or loaded, on a model that :func:`get_prefix_model` supports. Where the prefix has
            to stay in the key/value cache, a warning says why.

    Returns:
        ``peft_model``; its class is now a subclass of the one that it had. :func:`restore` gives it back.

    Raises:
        TypeError: not a PEFT model, or one of a class of the user's own.
        ValueError: accelerated already, inside ``disable_adapter()``, an adapter of another type or one that does not
            fit the model, a model that is not supported, sharded by FSDP2 already or tensor-parallel; the message says
            which and why.

    Source:
        Li and Liang, 2021: "Prefix-Tuning: Optimizing Continuous Prompts for Generation"; Eyuboglu et al., 2025:
        "Cartridges: Lightweight and general-purpose long context representations via self-study".
    """
    model = _supported_model_below(peft_model)
    config, layout = _prefixes_of_peft(model)
    adapters = _Adapters(layout)
    for name in peft_model.peft_config:
        adapters.check(peft_model, name)
    with unchanged_on_error(peft_model):
        _install(peft_model, model, config, adapters)
    return peft_model


def _install(peft_model: PeftModel, model: PreTrainedModel, config: PrefixTuningConfig, adapters: _Adapters) -> None:
    """Change ``peft_model`` and the ``model`` below it as :func:`accelerate` does."""
    adapters.hooks = install_hooks(model, adapters.layout, config, adapters)

    # `disable_adapter()` leaves PEFT's own methods behind on the object, where they would hide those of the subclass.
    for name in ("forward", "prepare_inputs_for_generation"):
        vars(peft_model).pop(name, None)
    peft_model.__class__ = _ACCELERATED[type(peft_model)]
    setattr(peft_model, _ADAPTERS, adapters)


def restore(peft_model: PeftModel) -> PeftModel:
    """Undo :func:`accelerate`, in place: PEFT's own class and the attention implementation from before.

    Returns:
        ``peft_model``.

    Raises:
        ValueError: ``peft_model`` is not accelerated, or is sharded by FSDP2.
    """
    if not isinstance(peft_model, _Accelerated):
        raise ValueError(f"peft_model: expected a model of accelerate(), got {type(peft_model).__name__}")
    if fsdp.units_of(peft_model):
        raise ValueError("peft_model: expected one that is not sharded, got one of fully_shard")
    getattr(peft_model, _ADAPTERS).hooks.remove(peft_model.base_model)
    delattr(peft_model, _ADAPTERS)
    peft_model.__class__ = type(peft_model).__bases__[-1]
    return peft_model


def _supported_model_below(peft_model: PeftModel) -> PreTrainedModel:
    """The model below ``peft_model``; errors as in :func:`accelerate`."""
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model: expected a peft.PeftModel, got {type(peft_model).__name__}")
    if isinstance(peft_model, _Accelerated):
        raise ValueError(f"{type(peft_model).__name__} is accelerated already; restore(peft_model) undoes it")
    if fsdp.units_of(peft_model):
        raise ValueError("peft_model: expected one that is not sharded yet, got one of fully_shard; call that later")
    for name, config in peft_model.peft_config.items():
        if config.peft_type not in PREFIX_TYPES:
            raise ValueError(
                f"peft_model: expected adapters of the types {', '.join(PREFIX_TYPES)}, got {name!r} of type "
                f"{getattr(config.peft_type, 'value', config.peft_type)}"
            )
    if not peft_model.peft_config:
        raise ValueError("peft_model: expected a model with an adapter, got one without any")
    if type(peft_model) is PeftModel:
        raise ValueError(
            "peft_model: expected a model with a task_type, got one without; PEFT runs it without its prefix, silently "
            "(give task_type, such as CAUSAL_LM, in the adapter's config)"
        )
    if type(peft_model) not in _ACCELERATED:
        raise TypeError(
            f"peft_model: expected one of {', '.join(cls.__name__ for cls in _ACCELERATED)}, "
            f"got {type(peft_model).__name__}"
        )
    if not peft_model.has_active_enabled_adapter:
        raise ValueError("peft_model: expected one with its adapter enabled, got one inside disable_adapter()")
    model = peft_model.base_model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"peft_model.base_model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    if is_tensor_parallel(model):
        raise ValueError(
            "peft_model: expected a model whose heads are not divided among processes (tp_plan), got one whose are, "
            "for which PEFT's tables are too wide; load_prefix_model reads its checkpoints into such a model"
        )
    if any(hasattr(module, SITE_ATTRIBUTE) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} below the PEFT model has a prefix already, of get_prefix_model or of another "
            "accelerated model"
        )
    return model


def _prefixes_of_peft(model: PreTrainedModel) -> tuple[PrefixTuningConfig, PrefixLayout]:
    """The attentions of ``model`` to which PEFT gives a prefix, and the settings with which the outputs are PEFT's."""
    # One length stands for those of all adapters, whose tables are PEFT's.
    config = PrefixTuningConfig(
        num_virtual_tokens=1,
        target_attentions=(DECODER,) if model.config.is_encoder_decoder else None,
        window_includes_prefix=True,
    )
    if not shares_cache_with_images(model):
        return config, find_layout(model, config)
    warnings.warn(
        f"{type(model).__name__}: its attentions to images read PEFT's prefix in the key/value cache, also where there "
        "is no image. So it stays there: every layer concatenates it in every call, as in PEFT",
        stacklevel=3,
    )
    config = dataclasses.replace(config, attention=CACHE)
    return config, PrefixLayout(find_cached_sites(model, cross_attention=True), config)


class _Settings(Protocol):
    """The settings of an adapter of one of PREFIX_TYPES, filled in by PEFT where the user left them out."""

    inference_mode: bool
    num_virtual_tokens: int
    num_layers: int
    num_attention_heads: int
    token_dim: int
    num_transformer_submodules: int


def _settings_of(peft_model: PeftModel, name: str) -> _Settings:
    return cast(_Settings, peft_model.peft_config[name])


class _Current(threading.local):
    """The accelerated model that runs in a thread: of threads, one may run what another has disabled."""

    model: PeftModel | None = None

    def __reduce__(self) -> tuple[type[_Current], tuple[()]]:
        return _Current, ()


@dataclass(eq=False)
class _Adapters:
    """The adapters of an accelerated model, as the hooks on the model below it know them.

    Attributes:
        layout: the attentions with a prefix.
        hooks: the hooks on the model below.
        context: nothing is ever open in it, as rows cannot name adapters.
        current: the accelerated model, or its replica in DataParallel, that runs in a thread.
    """

    layout: PrefixLayout
    hooks: PrefixHooks | None = None
    context: CallContext[PrefixSelection] = field(default_factory=CallContext)
    current: _Current = field(default_factory=_Current)

    def check(self, peft_model: PeftModel, name: str) -> None:
        """Raise ValueError where the adapter ``name`` does not fit the attentions."""
        config = _settings_of(peft_model, name)
        heads, width = config.num_attention_heads, config.token_dim
        for site in self.layout.sites:
            if site.value_head_dim != site.head_dim:
                raise ValueError(
                    f"adapter {name!r}: expected values of head dim {site.head_dim}, as the keys, because PEFT has one "
                    f"for both, got {site.value_head_dim} in {site.role} layer {site.depth}"
                )
            if (site.num_kv_heads, site.num_kv_heads * site.head_dim) != (heads, width):
                raise ValueError(
                    f"adapter {name!r}: expected num_attention_heads={site.num_kv_heads} and "
                    f"token_dim={site.num_kv_heads * site.head_dim}, the key/value heads of {site.role} layer "
                    f"{site.depth}, got {heads} and {width}"
                )
        is_encoder_decoder = bool(module_config(peft_model.base_model).is_encoder_decoder)
        if config.num_transformer_submodules != 1 + is_encoder_decoder:
            raise ValueError(
                f"adapter {name!r}: expected num_transformer_submodules={1 + is_encoder_decoder}, which PEFT uses for "
                f"models like {type(peft_model.base_model).__name__}, got {config.num_transformer_submodules}"
            )
        layers = layers_of_cache(self.layout.sites)
        if not is_encoder_decoder and config.num_layers <= max(layers):
            raise ValueError(
                f"adapter {name!r}: expected num_layers={max(layers) + 1}, the layers of the model, "
                f"got {config.num_layers}"
            )
        pairs_of_layers(config.num_layers, layers, is_encoder_decoder=is_encoder_decoder)

    def running(self) -> PeftModel | None:
        """The model of these adapters, if it runs in this thread with its adapter enabled."""
        model = self.current.model
        return model if model is not None and model.has_active_enabled_adapter else None

    @property
    def shift(self) -> int:
        """Number of positions by which sequences begin later, that of the running adapter; 0 if none runs."""
        peft_model = self.running()
        return 0 if peft_model is None else _settings_of(peft_model, peft_model.active_adapter).num_virtual_tokens

    @property
    def names(self) -> list[str]:
        """None: rows cannot name adapters."""
        return []

    def select(self, names: Sequence[RowNames]) -> PrefixSelection:
        raise ValueError(f"{PREFIX_NAMES}: expected None, got {names!r}; {_ONE_ADAPTER}")

    def stack_number(self, stack: nn.Module) -> int:
        raise NotImplementedError(_ONE_ADAPTER)

    def make_bank(self, names: Sequence[str], stack: nn.Module) -> PrefixBank:
        raise NotImplementedError(_ONE_ADAPTER)

    def make_banks(self, names: Sequence[str]) -> dict[int, PrefixBank]:
        raise NotImplementedError(_ONE_ADAPTER)

    def can_hold_banks(self) -> bool:
        return False

    def pairs(self, stack: nn.Module) -> dict[int, PrefixPair]:
        """The prefix ``[Hkv, P, D]`` of every attention, all in one stack, by site. Empty if none runs."""
        peft_model = self.running()
        if peft_model is None:
            return {}
        name = peft_model.active_adapter
        self.check(peft_model, name)
        config, encoder = _settings_of(peft_model, name), peft_model.prompt_encoder[name]
        table: Tensor
        if config.inference_mode:
            # PEFT then stores the generated table in place of the projection.
            table = cast(nn.Embedding, encoder.embedding).weight
        else:
            tokens = peft_model.prompt_tokens[name][: config.num_virtual_tokens]
            table = encoder(tokens[None].to(next(encoder.parameters()).device))[0]
        layers = table.view(table.shape[0], 2 * config.num_layers, config.num_attention_heads, -1)
        slices = layers.permute(1, 2, 0, 3).unbind(0)
        read = pairs_of_layers(
            config.num_layers,
            layers_of_cache(self.layout.sites),
            is_encoder_decoder=config.num_transformer_submodules == 2,
        )
        return {site: (slices[2 * pair], slices[2 * pair + 1]) for site, pair in enumerate(read)}


# A mixin of classes of PEFT, whose members it uses.
if TYPE_CHECKING:
    _Mixin = PeftModel
else:
    _Mixin = object


class _Accelerated(_Mixin):
    """Methods of an accelerated model in place of those of its PEFT class, the next one among its bases.

    Attributes:
        ignored_inputs: what PEFT takes and does not give to the model below. That its prefix tuning is without token
            types, even where the model has them, is how its adapters were trained.
    """

    ignored_inputs: tuple[str, ...] = ()
    positional_inputs: tuple[str, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.has_active_enabled_adapter:
            return self.base_model(*args, **kwargs)
        kwargs = dict(zip(self.positional_inputs, args, strict=False)) | kwargs
        return self._run(self.base_model, **self._given_to_the_model_below(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(super().generate, *args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        before = self._adapters_disabled
        self._adapters_disabled = True
        try:
            yield
        finally:
            self._adapters_disabled = before

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for name in ("adapter_names", PREFIX_NAMES):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: expected None, got {kwargs[name]}; {_ONE_ADAPTER}")
        current = getattr(self, _ADAPTERS).current
        before, current.model = current.model, self
        try:
            return function(*args, **kwargs)
        finally:
            current.model = before

    def _given_to_the_model_below(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs.pop("task_ids", None)
        for name in self.ignored_inputs:
            if kwargs.pop(name, None) is not None:
                warnings.warn(
                    f"{name}: PEFT's prefix tuning ignores them for this task, and so does this", stacklevel=4
                )
        return kwargs


class _AcceleratedGenerator(_Accelerated):
    base_model_prepare_inputs_for_generation: Callable[..., dict[str, Any]]

    # PeftModel, whose generating subclasses have the method, assigns to the name: mypy sees an attribute there.
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        return self._given_to_the_model_below(inputs) if self.has_active_enabled_adapter else inputs


def _accelerated(peft_class: type[PeftModel], mixin: type[_Accelerated], ignored_inputs: tuple[str, ...]) -> type:
    parameters = inspect.signature(peft_class.forward).parameters.values()
    # functools.wraps, because what calls a model looks at the signature of its forward.
    forward = functools.wraps(peft_class.forward)(lambda self, *args, **kwargs: mixin.forward(self, *args, **kwargs))
    members = {
        "__doc__": f"{peft_class.__name__} on the kernels of prefix_kernels; see :func:`accelerate`.",
        "__module__": __name__,
        "forward": forward,
        "ignored_inputs": ignored_inputs,
        "positional_inputs": tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:],
    }
    return type(f"Accelerated{peft_class.__name__}", (mixin, peft_class), members)


_ACCELERATED: dict[type[PeftModel], type] = {
    peft_class: _accelerated(peft_class, mixin, ignored_inputs)
    for peft_class, mixin, ignored_inputs in (
        (PeftModelForSequenceClassification, _Accelerated, ()),
        (PeftModelForTokenClassification, _Accelerated, ()),
        (PeftModelForQuestionAnswering, _Accelerated, ("token_type_ids", "position_ids")),
        (PeftModelForFeatureExtraction, _Accelerated, ("token_type_ids",)),
        (PeftModelForCausalLM, _AcceleratedGenerator, ("token_type_ids",)),
        (PeftModelForSeq2SeqLM, _AcceleratedGenerator, ("token_type_ids",)),
    )
}
# pickle finds a class by its name in its module.
globals().update({accelerated.__name__: accelerated for accelerated in _ACCELERATED.values()})
