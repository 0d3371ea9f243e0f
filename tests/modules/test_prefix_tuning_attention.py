"""PrefixTuningAttention is the textbook layer: a prefix in input space through frozen projections."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prefix_kernels.nn.prefix_tuning_attention
from prefix_kernels.nn.prefix_tuning_attention import PrefixTuningAttention

S, B, T, D_MODEL, HEADS, P = 5, 3, 7, 12, 3, 4
ATTN_MASKS = ("none", "2-D bool", "2-D float", "3-D bool")
PADDINGS = ("none", "bool", "float")


def make_layer(**options) -> PrefixTuningAttention:
    options = {"d_model": D_MODEL, "n_heads": HEADS, "prefix_len": P, "dtype": torch.float64} | options
    return PrefixTuningAttention(**options)


def hidden_to_added(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -math.inf)


def textbook(
    layer: PrefixTuningAttention, x: Tensor, context: Tensor, hidden: Tensor, added: Tensor | float = 0.0
) -> Tensor:
    """The definition for ``[B, S, d_model]``: the prefix stands before the input as if it had been part of it."""
    prefixed = torch.cat([layer.prefix.expand(context.shape[0], -1, -1), context], dim=1)

    def heads(projected: Tensor) -> Tensor:
        return projected.view(projected.shape[0], -1, layer.n_heads, layer.d_model // layer.n_heads).transpose(1, 2)

    q, k, v = heads(layer.q_proj(x)), heads(layer.k_proj(prefixed)), heads(layer.v_proj(prefixed))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores + F.pad(hidden_to_added(hidden) + added, (layer.prefix.shape[0], 0))
    return layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("attn_mask", ATTN_MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_equals_the_definition_with_all_its_gradients(batch_first, attn_mask, padding, is_causal, cross):
    layer = make_layer(batch_first=batch_first, freeze_projections=False)
    x = torch.randn(B, S, D_MODEL, dtype=torch.float64, requires_grad=True)
    context = torch.randn(B, T, D_MODEL, dtype=torch.float64, requires_grad=True) if cross else x
    k_len = context.shape[1]
    hidden, added, kwargs = torch.zeros(B, HEADS, S, k_len, dtype=torch.bool), 0.0, {}
    if attn_mask != "none":
        shape = (S, k_len) if attn_mask.startswith("2-D") else (B * HEADS, S, k_len)
        mask = torch.rand(shape) < 0.4
        hidden = hidden | (mask if mask.dim() == 2 else mask.view(B, HEADS, S, k_len))
        kwargs["attn_mask"] = mask if attn_mask.endswith("bool") else hidden_to_added(mask)
    if padding == "bool":
        kwargs["key_padding_mask"] = torch.arange(k_len) >= torch.tensor([[k_len], [2], [0]])
        hidden = hidden | kwargs["key_padding_mask"][:, None, None, :]
    elif padding == "float":
        kwargs["key_padding_mask"] = torch.randn(B, k_len, dtype=torch.float64)
        added = kwargs["key_padding_mask"][:, None, None, :]
    if is_causal:
        hidden = hidden | torch.ones(S, k_len, dtype=torch.bool).triu(k_len - S + 1)

    def to_layout(tensor: Tensor) -> Tensor:
        return tensor if batch_first else tensor.transpose(0, 1)

    out = layer(to_layout(x), is_causal=is_causal, context=to_layout(context) if cross else None, **kwargs)
    expected = textbook(layer, x, context, hidden, added)
    leaves = [x, *([context] if cross else []), *layer.parameters()]
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((to_layout(out) * weight).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), leaves)
    for a, e in zip((to_layout(out), *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_by_default_it_is_a_layer_of_128_features_4_heads_and_5_prefix_positions_that_keeps_the_shape():
    layer = PrefixTuningAttention()
    assert layer.prefix.shape == (5, 128)
    assert layer.n_heads == 4
    out = layer(torch.randn(7, 2, 128))
    assert out.shape == (7, 2, 128)
    assert out.is_contiguous()


def test_a_prefix_equals_positions_prepended_to_the_input():
    layer = make_layer()
    x = torch.randn(S, B, D_MODEL, dtype=torch.float64)
    bare = make_layer(prefix_len=0)
    bare.load_state_dict({**layer.state_dict(), "prefix": bare.prefix})
    prepended = torch.cat([layer.prefix[:, None].expand(-1, B, -1), x])
    torch.testing.assert_close(layer(x), bare(prepended)[P:])


def test_the_projections_are_frozen_and_the_prefix_alone_gets_a_gradient():
    layer = make_layer()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["prefix"]
    layer(torch.randn(S, B, D_MODEL, dtype=torch.float64)).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["prefix"]
    assert all(p.requires_grad for p in make_layer(freeze_projections=False).parameters())


def test_training_lowers_the_loss_and_moves_the_prefix_alone():
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    x, target = torch.randn(2, S, B, D_MODEL, dtype=torch.float64)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target.mean((0, 1)).expand_as(target))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    moved = [name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved == ["prefix"]


def test_the_prefix_is_projected_once_and_never_expanded_to_the_batch(monkeypatch):
    layer = make_layer()
    seen = {}

    def record(query, key, value, prefix_key, prefix_value, *args, **kwargs):
        seen.update(locals())
        return original(query, key, value, prefix_key, prefix_value, *args, **kwargs)

    original = prefix_kernels.nn.prefix_tuning_attention.prefix_attention
    monkeypatch.setattr(prefix_kernels.nn.prefix_tuning_attention, "prefix_attention", record)
    rows = []
    layer.k_proj.register_forward_hook(lambda module, args, out: rows.append(out.numel() // D_MODEL))
    layer(torch.randn(S, B, D_MODEL, dtype=torch.float64))
    assert sorted(rows) == [P, S * B]
    assert seen["prefix_key"].shape == seen["prefix_value"].shape == (HEADS, P, D_MODEL // HEADS)
    assert seen["prefix_key"].untyped_storage().nbytes() == layer.prefix.nbytes
    assert seen["key"].untyped_storage().nbytes() == S * layer.prefix[0].nbytes * B


def test_attention_dropout_acts_in_training_alone():
    layer = make_layer(dropout=1.0)
    x = torch.randn(S, B, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(layer.train()(x), layer.out_proj.bias.expand_as(x))
    torch.testing.assert_close(layer.eval()(x), make_layer_like(layer, dropout=0.0).train()(x))


def make_layer_like(layer: PrefixTuningAttention, **options) -> PrefixTuningAttention:
    other = make_layer(**options)
    other.load_state_dict(layer.state_dict())
    return other


def test_it_compiles_without_graph_breaks_to_the_same_result():
    layer = make_layer()
    x = torch.randn(S, B, D_MODEL, dtype=torch.float64)
    padding = torch.arange(S) >= torch.tensor([[S], [2], [1]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, key_padding_mask=padding), layer(x, key_padding_mask=padding))


def test_the_gradient_of_the_prefix_passes_gradcheck():
    layer = make_layer(d_model=4, n_heads=2, prefix_len=2)
    x = torch.randn(2, 2, 4, dtype=torch.float64)

    def call(prefix: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"prefix": prefix}, (x,), {"is_causal": True})

    assert torch.autograd.gradcheck(call, layer.prefix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "n_heads: expected a divisor of d_model=12, got 5"),
        ({"n_heads": 0}, "n_heads: expected a divisor"),
        ({"prefix_len": -1}, "prefix_len: expected at least 0, got -1"),
        ({"dropout": 1.5}, r"dropout: expected a probability in \[0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


X = torch.zeros(S, B, D_MODEL, dtype=torch.float64)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0],), {}, ValueError, r"x: expected \[S, B, 12\], got \[3, 12\]"),
        ((X[..., :4],), {}, ValueError, r"x: expected \[S, B, 12\], got \[5, 3, 4\]"),
        ((X,), {"context": X[..., :4]}, ValueError, r"context: expected \[S, B, 12\], got \[5, 3, 4\]"),
        ((X,), {"context": X[:, :1]}, ValueError, r"context: expected a batch of 3 in dimension 1, got \[5, 1, 12\]"),
        (
            (X,),
            {"attn_mask": torch.zeros(2, 5)},
            ValueError,
            r"attn_mask: expected \[5, 5\] or \[9, 5, 5\], got \[2, 5",
        ),
        ((X,), {"key_padding_mask": torch.zeros(5, 3)}, ValueError, r"key_padding_mask: expected \[3, 5\], got \[5, 3"),
        ((X,), {"attn_mask": torch.zeros(5, 5, dtype=torch.int8)}, TypeError, "attn_mask: expected bool or floating"),
    ],
)
def test_bad_calls_are_refused_by_name(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        make_layer()(*args, **kwargs)


def test_its_weights_are_those_of_the_usual_linear_projections():
    """A pretrained attention's projections load by name."""
    layer = make_layer()
    assert all(isinstance(layer.get_submodule(f"{name}_proj"), nn.Linear) for name in ("q", "k", "v", "out"))
    assert len(layer.state_dict()) == 9
