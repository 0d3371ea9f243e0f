"""Dropout: the bits of the counter-based generator, the same in forward and backward, in every tile and segment."""

import pytest
import torch
from helpers import check, make_call, run

from prefix_kernels import prefix_attention
from prefix_kernels.reference import dropout_keep, dropout_threshold

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SEEDS = [0, 1, 2**31 + 5, 2**63 - 1, -1, -(2**63)]


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [1e-6, 0.1, 0.5, 0.9, 1.0])
def test_dropout_at_every_rate(dropout_p, dtype):
    call = make_call(
        q_heads=4,
        kv_heads=2,
        q_len=40,
        k_len=70,
        prefix_len=20,
        head_dim=32,
        dtype=dtype,
        dropout_p=dropout_p,
        dropout_seed=seed_of(7),
    )
    check(call)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_64_bits_of_the_seed_count(seed):
    check(make_call(q_len=33, k_len=47, dropout_p=0.3, dropout_seed=seed_of(seed)))


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "query_offset": 3},
        {"window_size": (20, 5)},
        {"softcap": 2.0},
        {"attn_mask": torch.arange(150) < 100},
        {"attn_mask": torch.linspace(-1, 1, 170)},
        {"window_size": (30, -1), "is_causal": True, "window_includes_prefix": True},
    ],
    ids=str,
)
def test_dropout_with_every_other_option(options):
    call = make_call(
        q_len=140, k_len=150, prefix_len=20, head_dim=32, dropout_p=0.2, dropout_seed=seed_of(11), **options
    )
    check(call)


@pytest.mark.parametrize("ids", [[1, 0, -1], [[0, 1], [-1, 2], [2, 2]]], ids=str)
def test_every_slot_of_a_bank_draws_its_own_bits(ids):
    call = make_call(
        batch=3,
        q_len=40,
        k_len=30,
        prefix_len=18,
        num_prefixes=3,
        head_dim=32,
        dropout_p=0.4,
        dropout_seed=seed_of(3),
        prefix_ids=torch.tensor(ids),
        prefix_lens=torch.tensor([18, 5, 17]),
    )
    check(call)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("prefix_len, k_len", [(20, 180), (1, 130), (0, 200), (129, 100), (16, 16), (200, 0)])
def test_the_kept_elements_are_the_reference_s_bit_for_bit(prefix_len, k_len, is_causal):
    """With unit vectors as values the output is the matrix of probabilities itself; likewise dvalue from unit dout."""
    q_len, columns, dropout_p, seed = 150, prefix_len + k_len, 0.25, 123456789123
    basis = torch.eye(columns, 256)
    query, key = torch.randn(1, 2, q_len, 256), torch.randn(1, 2, k_len, 256)
    prefix_key, prefix_value = torch.randn(2, prefix_len, 256), basis[:prefix_len].expand(2, -1, -1).contiguous()
    value = basis[prefix_len:].expand(1, 2, -1, -1).contiguous().requires_grad_()
    prefix_value.requires_grad_()
    options = dict(is_causal=is_causal, dropout_p=dropout_p, dropout_seed=seed_of(seed))
    out = prefix_attention(query, key, value, prefix_key, prefix_value, **options)
    out.backward(torch.eye(q_len, 256).expand_as(out))

    for head in range(2):
        keep = torch.cat(
            [
                dropout_keep(seed, dropout_p, head, segment=1, rows=q_len, columns=prefix_len),
                dropout_keep(seed, dropout_p, head, segment=0, rows=q_len, columns=k_len)
                & (torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len) if is_causal else True),
            ],
            dim=1,
        )
        dvalue = torch.cat([prefix_value.grad[head], value.grad[0, head]])
        assert torch.equal(out[0, head, :, :columns] != 0, keep)
        assert torch.equal(dvalue[:, :q_len].T != 0, keep)


def test_probability_one_drops_everything_and_keeps_lse():
    call = make_call(q_len=20, dropout_p=1.0, dropout_seed=seed_of(1))
    result = check(call)
    assert (result.out == 0).all() and result.lse.isfinite().all()
    assert dropout_threshold(1.0) == 65536


def test_probability_zero_ignores_the_seed():
    plain = run(make_call(q_len=20))
    seeded = run(make_call(q_len=20, dropout_p=0.0, dropout_seed=seed_of(1)))
    assert torch.equal(plain.out, seeded.out)


def test_lse_is_that_of_the_scores_before_dropout():
    shape = dict(q_len=40, k_len=50)
    assert torch.equal(run(make_call(**shape, dropout_p=0.5, dropout_seed=seed_of(1))).lse, run(make_call(**shape)).lse)


def test_without_a_seed_torch_s_generator_decides():
    inputs = make_call(q_len=40, k_len=50).inputs

    def draw() -> torch.Tensor:
        return prefix_attention(**inputs, dropout_p=0.3)

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


def test_evaluation_does_not_advance_torch_s_generator():
    inputs = make_call(q_len=40, k_len=50).inputs
    before = torch.get_rng_state()
    prefix_attention(**inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mean_over_many_seeds_is_the_result_without_dropout():
    inputs = make_call(batch=1, q_len=8, k_len=8, head_dim=8, layout="contiguous").inputs
    seeds = 3000
    many = {
        name: tensor if name.startswith("prefix") else tensor.expand(seeds, -1, -1, -1)
        for name, tensor in inputs.items()
    }
    mean = prefix_attention(**many, dropout_p=0.5, dropout_seed=seed_of(9)).mean(0)
    torch.testing.assert_close(mean, prefix_attention(**inputs)[0], atol=0.08, rtol=0)
