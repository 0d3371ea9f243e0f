"""PrefixEncoder: the prefixes of all layers from one table."""

from __future__ import annotations

import copy

import pytest
import torch

from prefix_kernels.functional import prefix_attention
from prefix_kernels.nn.encoder import PrefixEncoder

P, L, H, D = 3, 4, 2, 5
PROJECTIONS = pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])


def make_encoder(projection: bool = False, **options) -> PrefixEncoder:
    if projection:
        options = {"hidden_size": 16, "embedding_dim": 7} | options
    return PrefixEncoder(P, L, H, D, projection=projection, dtype=torch.float64, **options)


def flat(encoder: PrefixEncoder) -> list[torch.Tensor]:
    return [tensor for pair in encoder() for tensor in pair]


@PROJECTIONS
def test_each_layer_gets_its_two_slices_of_the_table_as_views_of_it(projection):
    encoder = make_encoder(projection)
    table = encoder.folded_prefix_state()["table"]
    assert table.shape == (P, 2 * L, H, D)
    assert not table.requires_grad
    prefixes = encoder()
    assert len(prefixes) == L
    for layer, (prefix_key, prefix_value) in enumerate(prefixes):
        torch.testing.assert_close(prefix_key, table[:, 2 * layer].transpose(0, 1))
        torch.testing.assert_close(prefix_value, table[:, 2 * layer + 1].transpose(0, 1))
        assert prefix_key.stride() == prefix_value.stride() == (D, 2 * L * H * D, 1)
    storages = {prefix.untyped_storage().data_ptr() for pair in prefixes for prefix in pair}
    assert len(storages) == 1
    assert projection or storages == {encoder.table.untyped_storage().data_ptr()}


def test_the_projection_is_embedding_linear_tanh_linear():
    encoder = make_encoder(projection=True)
    state = encoder.state_dict()
    hidden = torch.tanh(state["embedding.weight"] @ state["transform.0.weight"].T + state["transform.0.bias"])
    table = (hidden @ state["transform.2.weight"].T + state["transform.2.bias"]).view(P, L, 2, H, D)
    assert table.shape[0] == P
    for layer, pair in enumerate(encoder()):
        for kind, prefix in enumerate(pair):
            torch.testing.assert_close(prefix, table[:, layer, kind].transpose(0, 1))


def test_a_peft_table_is_the_parameter_itself():
    encoder = make_encoder()
    prompt_embeddings = torch.randn(P, 2 * L * H * D, dtype=torch.float64)
    encoder.load_state_dict({"table": prompt_embeddings.view_as(encoder.table)})
    past_key_values = prompt_embeddings.view(P, 2 * L, H, D).permute(1, 2, 0, 3)
    for layer, (prefix_key, prefix_value) in enumerate(encoder()):
        assert torch.equal(prefix_key, past_key_values[2 * layer])
        assert torch.equal(prefix_value, past_key_values[2 * layer + 1])
    assert torch.equal(encoder.table.flatten(1), prompt_embeddings)


@PROJECTIONS
def test_gradients_reach_every_parameter_through_every_layer(projection):
    encoder = make_encoder(projection)
    query = torch.randn(2, 2 * H, 3, D, dtype=torch.float64)
    key = torch.randn(2, H, 3, D, dtype=torch.float64)
    weights = torch.randn(L, *query.shape, dtype=torch.float64)

    def loss_of(prefixes) -> torch.Tensor:
        outs = [prefix_attention(query, key, key, *pair) for pair in prefixes]
        return sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))

    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(loss_of(encoder()), parameters)
    table = encoder._generate() if projection else encoder.table
    copies = [(table[:, 2 * i].transpose(0, 1).clone(), table[:, 2 * i + 1].transpose(0, 1).clone()) for i in range(L)]
    for actual, expected in zip(gradients, torch.autograd.grad(loss_of(copies), parameters), strict=True):
        assert actual.any()
        torch.testing.assert_close(actual, expected)


def test_folding_keeps_the_outputs_and_leaves_the_table_alone():
    encoder = make_encoder(projection=True)
    before, parameters = flat(encoder), sum(p.numel() for p in encoder.parameters())
    assert encoder.projection
    assert encoder.fold() is encoder
    assert not encoder.projection
    assert [(name, p.shape) for name, p in encoder.named_parameters()] == [("table", (P, 2 * L, H, D))]
    assert encoder.table.requires_grad
    assert encoder.table.is_leaf
    assert encoder.table.numel() < parameters
    for prefix, expected in zip(flat(encoder), before, strict=True):
        assert torch.equal(prefix, expected)


def test_folding_twice_or_without_a_projection_changes_nothing():
    encoder = make_encoder()
    table = encoder.table
    assert encoder.fold().fold().table is table


def test_a_frozen_encoder_folds_to_a_frozen_table():
    assert not make_encoder(projection=True).requires_grad_(False).fold().table.requires_grad


def test_a_folded_encoder_is_trained_copied_and_loaded_like_a_direct_one():
    folded = make_encoder(projection=True).fold()
    direct = make_encoder()
    direct.load_state_dict(folded.state_dict())
    for prefix, expected in zip(flat(copy.deepcopy(folded)), flat(direct), strict=True):
        assert torch.equal(prefix, expected)
    flat(folded)[1].sum().backward()
    assert folded.table.grad[:, 1].eq(1).all()
    assert folded.table.grad.sum() == P * H * D


@pytest.mark.parametrize("frozen", [1, P])
def test_frozen_tokens_are_seen_and_out_of_reach_of_gradients_and_optimizers(frozen):
    encoder = make_encoder(num_frozen_tokens=frozen)
    before = flat(copy.deepcopy(encoder))
    assert [name for name, _ in encoder.named_parameters()] == ["table"]
    for prefix, expected in zip(flat(encoder), encoder.full_table().permute(1, 2, 0, 3), strict=True):
        assert prefix.shape == (H, P, D)
        assert torch.equal(prefix, expected)
    # Whatever is said to be trainable.
    encoder.requires_grad_(True)
    sum(prefix.square().sum() for prefix in flat(encoder)).backward()
    torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.1).step()
    for prefix, old in zip(flat(encoder), before, strict=True):
        assert torch.equal(prefix[:, :frozen], old[:, :frozen])
        assert prefix[:, frozen:].ne(old[:, frozen:]).all()


def test_frozen_tokens_begin_like_the_others_and_stay_frozen_when_folded():
    encoder = PrefixEncoder(100, L, 4, 8, num_frozen_tokens=50, init_std=[0.01, 0.1, 1.0, 3.0])
    for layer, std in enumerate([0.01, 0.1, 1.0, 3.0]):
        for table in (encoder.table, encoder.frozen_table):
            assert table[:, 2 * layer : 2 * layer + 2].std().item() == pytest.approx(std, rel=0.1)
    table = encoder.table
    assert encoder.fold().table is table
    assert encoder.num_frozen_tokens == len(encoder.frozen_table) == 50


@PROJECTIONS
def test_dropout_zeroes_entries_in_training_alone(projection):
    encoder = PrefixEncoder(50, L, H, D, projection=projection, dropout=0.25)
    table = torch.stack(flat(encoder.eval()))
    assert torch.equal(torch.stack(flat(encoder)), table)
    dropped = torch.stack(flat(encoder.train()))
    kept = dropped != 0
    assert 0.2 < 1 - kept.double().mean() < 0.3
    torch.testing.assert_close(dropped[kept], table[kept] / 0.75)


@PROJECTIONS
def test_the_initial_standard_deviation_can_be_set_for_each_layer(projection):
    stds = [0.01, 0.1, 1.0, 3.0]
    encoder = PrefixEncoder(100, L, 4, 8, projection=projection, init_std=stds)
    for (prefix_key, prefix_value), std in zip(encoder(), stds, strict=True):
        assert torch.cat([prefix_key, prefix_value]).std().item() == pytest.approx(std, rel=0.1)
    same = PrefixEncoder(100, L, 4, 8, projection=projection, init_std=0.5)
    assert same.folded_prefix_state()["table"].std().item() == pytest.approx(0.5, rel=0.05)


def test_a_direct_table_starts_from_the_standard_normal_distribution():
    assert PrefixEncoder(100, L, 4, 8).table.std().item() == pytest.approx(1.0, rel=0.05)


def test_parameters_can_be_drawn_anew():
    for encoder in (make_encoder(), make_encoder(projection=True, init_std=0.1)):
        before = flat(encoder)[0].clone()
        encoder.reset_parameters()
        assert not torch.equal(flat(encoder)[0], before)


@pytest.mark.parametrize("options", [{}, {"projection": True}, {"num_frozen_tokens": 1}], ids=str)
def test_it_compiles_without_graph_breaks_to_the_same_prefixes(options):
    encoder = make_encoder(**options)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for pair, expected in zip(compiled(), encoder(), strict=True):
        torch.testing.assert_close(pair, expected)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0, L, H, D), {}, "num_prefix_tokens: expected at least 1, got 0"),
        ((P, 0, H, D), {}, "num_layers: expected at least 1, got 0"),
        ((P, L, 0, D), {}, "num_heads: expected at least 1, got 0"),
        ((P, L, H, 0), {}, "head_dim: expected at least 1, got 0"),
        ((P, L, H, D), {"hidden_size": 4}, "hidden_size: expected None without projection=True, got 4"),
        ((P, L, H, D), {"embedding_dim": 4}, "embedding_dim: expected None without projection=True, got 4"),
        ((P, L, H, D), {"hidden_size": 0, "projection": True}, "hidden_size: expected at least 1, got 0"),
        ((P, L, H, D), {"num_frozen_tokens": P + 1}, "num_frozen_tokens: expected 0 to 3, got 4"),
        ((P, L, H, D), {"num_frozen_tokens": -1}, "num_frozen_tokens: expected 0 to 3, got -1"),
        (
            (P, L, H, D),
            {"num_frozen_tokens": 1, "projection": True},
            r"num_frozen_tokens: expected 0 with projection=True \(every row moves .*\), got 1",
        ),
        ((P, L, H, D), {"dropout": -0.1}, r"dropout: expected a probability in \[0, 1\], got -0.1"),
        ((P, L, H, D), {"init_std": [0.1, 0.2]}, r"init_std: expected one number or one per layer \(4\), got 2"),
    ],
)
def test_bad_options_are_refused_by_name(args, options, message):
    with pytest.raises(ValueError, match=message):
        PrefixEncoder(*args, **options)
