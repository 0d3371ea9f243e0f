"""Models whose weights `accelerate` keeps elsewhere: on the meta device between calls, loaded by a hook for each call.

``cpu_offload``, ``disk_offload`` and ``dispatch_model`` leave such a hook, ``_hf_hook``, at every module with weights,
or at a block of them. ``model.device`` is that of the first weight, so it can be ``meta`` for a model that runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.structure.routes import prefix_sites

_HOOK = "_hf_hook"


def running_device(model: PreTrainedModel) -> torch.device:
    """The device on which the attentions of ``model`` run, and its prefix belongs.

    The hooks of `accelerate` at the first attention name it. Without them it is ``model.device``, or where that is
    ``meta`` the device of the first parameter with storage. A model that is all meta stays so.
    """
    if hooked := [module for module in model.modules() if hasattr(module, _HOOK)]:
        for site in prefix_sites(model):
            around = [module for module in reversed(hooked) if any(one is site.module for one in module.modules())]
            for module in (*site.module.modules(), *around):
                if (device := _execution_device(module)) is not None:
                    return device
    if model.device.type != "meta":
        return model.device
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), model.device)


def keep_loaded(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Load the weights of the named modules of ``model`` for good where `accelerate` offloads them.

    Modules that are trained need it: a hook loads weights into new parameters for every call, which no optimizer knows.

    Raises:
        ValueError: offloaded weights are tied to one of them, and would no longer be.
    """
    offloaded = [name for name in names if any(_offloading(part) for part in model.get_submodule(name).modules())]
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        for name in offloaded:
            tied = [key.startswith(f"{name}.") for key in (target, source)]
            if any(tied) and not all(tied):
                raise ValueError(
                    f"modules_to_save: expected modules that share no offloaded weights, got {name!r}, where "
                    f"{target} is tied to {source}; untie them (tie_word_embeddings=False) or do not offload them"
                )
    for name in offloaded:
        for part in model.get_submodule(name).modules():
            _stay_loaded(part)


def _stay_loaded(part: nn.Module) -> None:
    """Load the weights of ``part`` and exchange the hook that does so for one that moves its inputs alone."""
    if not (offloading := _offloading(part)):
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    hook = offloading[0]
    hook.pre_forward(part)
    remove_hook_from_module(part)
    add_hook_to_module(
        part,
        AlignDevicesHook(
            execution_device=hook.execution_device,
            io_same_device=hook.io_same_device,
            skip_keys=hook.skip_keys,
            place_submodules=hook.place_submodules,
        ),
    )


@contextmanager
def loaded(part: nn.Module, whole: nn.Module) -> Iterator[None]:
    """Context manager in which the weights of ``part`` are loaded, if a hook of a module around it loads them.

    A hook of ``part`` itself is left to load them whenever ``part`` is called.

    Args:
        part: a module whose weights are offloaded, and needed outside the ``forward`` of the modules around it.
        whole: the outermost module to look for such a hook at.
    """
    if _offloading(part):
        yield
        return
    owners = [module for module in whole.modules() if any(one is part for one in module.modules())]
    owner = next((module for module in reversed(owners) if _offloading(module)), None)
    if owner is None:
        yield
        return
    hook = _offloading(owner)[0]
    hook.pre_forward(owner)
    try:
        yield
    finally:
        hook.post_forward(owner, None)


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of `accelerate` at ``module``: none, one, or several in one."""
    hook = getattr(module, _HOOK, None)
    return list(getattr(hook, "hooks", () if hook is None else (hook,)))


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of `accelerate` that load the weights of ``module`` for each call."""
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False)]


def _execution_device(module: nn.Module) -> torch.device | None:
    """The device that a hook of `accelerate` runs ``module`` on, if it names one with storage."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None and torch.device(device).type != "meta":
            return torch.device(device)
    return None
