"""A model with its prefix in the key/value cache, and the oracle that its tests compare it with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.compatibility.own_cache import holding
from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model


def prepared(base: PreTrainedModel, length: int = 4, **settings: object) -> PreTrainedModel:
    """A copy of ``base`` with a prefix in its cache."""
    torch.manual_seed(1)
    defaults = {"num_virtual_tokens": length, "init_std": 0.5, "modules_to_save": (), "window_includes_prefix": True}
    return get_prefix_model(copy.deepcopy(base), PrefixTuningConfig(**defaults | {"attention": "cache"} | settings))


def from_own_cache(base: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor], **more: object) -> Tensor:
    """Logits of the plain ``base``, given a cache that begins with the prefixes of ``model``."""
    layout = model._prefix_state.tasks.layout
    pairs = layout.pairs(model.prefix_encoder, layout.stacks[0])
    with holding(base, {site.cache_layer: pairs[index] for index, site in enumerate(layout.sites)}):
        return base(**inputs, **more).logits


def check_equal(model: PreTrainedModel, actual: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    """Compare logits, and the gradients of the prefix, none of which is zero."""
    weights = torch.ones(()) if "decoder_input_ids" in inputs else inputs["attention_mask"][..., None].float()
    torch.testing.assert_close(actual * weights, expected * weights, rtol=0, atol=1e-5)
    tables = list(model.prefix_encoder.parameters())
    ours, theirs = (torch.autograd.grad((x * weights).square().sum(), tables) for x in (actual, expected))
    for grad, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-5 * other.abs().max().item())
        assert (grad.abs().amax((0, 2, 3)) > 0).all()
