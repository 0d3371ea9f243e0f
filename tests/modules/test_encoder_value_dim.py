"""PrefixEncoder where values have a head dim of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from prefix_kernels import PrefixEncoder, load_prefix, save_prefix

SIZES = {"num_prefix_tokens": 6, "num_layers": 3, "num_heads": 2, "head_dim": 8, "value_head_dim": 5}
KINDS = {"table": {}, "projection": {"projection": True, "hidden_size": 7}, "frozen": {"num_frozen_tokens": 2}}
kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


@kinds
def test_keys_and_values_have_their_head_dims_and_train(settings: dict) -> None:
    encoder = PrefixEncoder(**SIZES, **settings)
    pairs = encoder()
    assert [(key.shape, value.shape) for key, value in pairs] == [((2, 6, 8), (2, 6, 5))] * 3
    assert all(x.stride(-1) == 1 for pair in pairs for x in pair)
    sum((i + 1) * x.square().sum() for i, x in enumerate(x for pair in pairs for x in pair)).backward()
    for parameter in encoder.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    assert encoder.full_table().shape == (6, 3, 2, 13)


def test_packed_is_the_inverse_of_forward() -> None:
    for sizes in (SIZES, SIZES | {"value_head_dim": 8}, SIZES | {"value_head_dim": None}):
        encoder = PrefixEncoder(**sizes)
        assert torch.equal(encoder.packed(encoder()), encoder.full_table())


@kinds
def test_each_layer_has_its_standard_deviation(settings: dict) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_prefix_tokens": 400}
    encoder = PrefixEncoder(**sizes, **settings, init_std=[0.1, 1.0, 3.0])
    for (key, value), std in zip(encoder(), (0.1, 1.0, 3.0), strict=True):
        both = torch.cat([key.flatten(), value.flatten()])
        torch.testing.assert_close(both.square().mean().sqrt(), torch.tensor(std), rtol=0.1, atol=0)


@kinds
def test_a_stored_prefix_comes_back(settings: dict, tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": PrefixEncoder(**SIZES, **settings)}).eval()
    expected = model["encoder"]()
    save_prefix(model, tmp_path / "task.safetensors", fold=True)
    model["encoder"].fold()
    other = nn.ModuleDict({"encoder": PrefixEncoder(**SIZES, num_frozen_tokens=settings.get("num_frozen_tokens", 0))})
    load_prefix(other, tmp_path / "task.safetensors")
    for encoder in (model["encoder"], other["encoder"]):
        for pair, expected_pair in zip(encoder(), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(pair, expected_pair, strict=True))


def test_a_head_dim_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="value_head_dim: expected at least 1, got 0"):
        PrefixEncoder(**SIZES | {"value_head_dim": 0})
