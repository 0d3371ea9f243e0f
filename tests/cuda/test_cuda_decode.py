"""The decode kernels in the emulator: what they read, in how many launches, and the bits of their merge."""

from functools import partial

import pytest
import torch
from emulated import emulated_prefix_attention, load
from helpers import check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# The host code splits the keys of few queries into as many parts as the multiprocessors need.
FEW, MANY = 1, 1000
SEED = torch.tensor([5])


@pytest.fixture(autouse=True)
def usual_device():
    load().device(80, MANY)


@pytest.fixture(params=[FEW, MANY], ids=["sm1", "sm1000"])
def multiprocessors(usual_device, request):
    load().device(80, request.param)


def check_forward(**shape):
    defaults = dict(dtype=torch.float16, layout="aligned", head_dim=64, with_dlse=False)
    return check(make_call(**defaults | shape), needs=(), function=emulated_prefix_attention)


@pytest.mark.parametrize("batch, prefixes", [(40, None), (40, 40), (70, 2), (33, 1)])
@pytest.mark.parametrize("group, q_len", [(1, 1), (4, 1), (2, 5), (16, 1)])
def test_decoding_reads_a_shared_prefix_for_bunches_of_rows(group, q_len, batch, prefixes):
    ids = None if prefixes in (None, batch) else torch.arange(batch) * 7 % (prefixes + 1) - 1
    shape = dict(batch=batch, q_heads=group, kv_heads=1, q_len=q_len, k_len=20, prefix_len=600)
    for head_dim in (32, 256):
        check_forward(**shape, num_prefixes=prefixes, prefix_ids=ids, head_dim=head_dim)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize(
    "batch, group, q_len, head_dim",
    [(*shape, head_dim) for shape in [(3, 2, 1), (32, 1, 1), (5, 4, 1), (2, 8, 2)] for head_dim in (64, 128, 256)]
    + [(3, 2, 9, 128)]  # more rows than always decode: here because they share most of what they read
    # more rows than a narrow block has
    + [(32, 4, 1, head_dim) for head_dim in (32, 64, 96, 128)]
    + [(4, 16, 1, 192), (12, 5, 1, 256), (3, 3, 14, 128)],
)
def test_decoding_reads_each_row_of_keys_and_values_once_per_batch(batch, group, q_len, head_dim):
    reads_once_per_batch(batch, group, q_len, head_dim)


HOLES = torch.rand(2, 1, 1, 600, generator=torch.Generator().manual_seed(1)) < 0.8
# Calls whose rows have several parts, or one.
MERGED = {
    "long sequence": dict(q_len=1, k_len=900, q_heads=4, kv_heads=2, prefix_len=None),
    "several queries, causal": dict(q_len=5, k_len=300, q_heads=6, kv_heads=2, prefix_len=290, is_causal=True),
    "more rows than a block has": dict(
        batch=1, q_heads=5, kv_heads=1, q_len=14, k_len=290, prefix_len=20, is_causal=True
    ),
    "one prefix for all": dict(batch=17, q_heads=2, kv_heads=1, q_len=1, k_len=20, prefix_len=300),
    "one prefix for all, in a wide block": dict(batch=21, q_heads=5, kv_heads=1, q_len=1, k_len=20, prefix_len=300),
    "several prefixes a row, the same one twice": dict(
        batch=3,
        q_len=2,
        k_len=280,
        prefix_len=270,
        num_prefixes=2,
        prefix_ids=torch.tensor([[0, 0, 1], [-1, 1, 0], [-1, -1, -1]]),
        prefix_lens=torch.tensor([270, 3]),
    ),
    "padding and dropout": dict(batch=2, q_len=2, k_len=600, attn_mask=HOLES, dropout_p=0.2, dropout_seed=SEED),
    "one part": dict(q_len=1, k_len=100, prefix_len=None),
    "nothing to see": dict(q_len=1, k_len=0, prefix_len=None),
    "odd head dim": dict(q_len=1, k_len=600, head_dim=36, layout="poisoned"),
    "head dim 256": dict(q_len=2, k_len=600, head_dim=256, prefix_len=130),
}


@pytest.mark.parametrize("shape", MERGED.values(), ids=MERGED)
def test_the_last_block_to_arrive_merges_the_bits_of_the_second_kernel(shape):
    """Again and again, as a graph replays it: each launch leaves the counters zero."""
    call = make_call(**dict(dtype=torch.float16, layout="aligned", head_dim=64, with_dlse=False) | shape)
    load().device(80, MANY, counters=0)
    expected = run(call, emulated_prefix_attention, needs=())
    load().device(80, MANY)
    for seed in range(4):
        got = run(call, partial(emulated_prefix_attention, seed=seed), needs=())
        for name, tensor in got.tensors().items():
            assert torch.equal(tensor, getattr(expected, name)), (name, seed)
    check(call, needs=(), function=emulated_prefix_attention)


BANK = dict(prefix_len=290, num_prefixes=3, prefix_ids=torch.tensor([2, 0]), prefix_lens=torch.tensor([9, 0, 290]))


@pytest.mark.parametrize(
    ("shape", "counters", "launches"),
    [
        (dict(k_len=600), 1024, 1),
        (dict(k_len=600), 0, 2),
        (dict(k_len=600), 7, 2),  # one fewer than batch rows and key heads
        (dict(k_len=600, **BANK), 1024, 1),
        (dict(k_len=100, prefix_len=None), 0, 1),  # one part
        (dict(q_len=150, **BANK), 1024, 2),
        (dict(batch=16, q_heads=8, kv_heads=2, k_len=3000, prefix_len=600), 1024, 2),  # 64 rows of 13 parts
    ],
    ids=["few parts", "no counters", "too few counters", "a bank", "one part", "a bank, many queries", "many parts"],
)
def test_the_kernels_that_a_call_launches(shape, counters, launches):
    load().device(80, MANY, counters=counters)
    load().take_launches()
    check_forward(**dict(batch=2, q_heads=4, q_len=1) | shape)
    assert load().take_launches() == launches


def test_decoding_with_less_shared_memory_reads_a_prefix_twice_for_many_rows():
    load().device(80, FEW)
    reads_once_per_batch(32, 4, 1, 128)
    load().device(86, FEW)
    reads_once_per_batch(32, 4, 1, 64)
    reads_once_per_batch(32, 4, 1, 128, times=2)


def reads_once_per_batch(batch, group, q_len, head_dim, times=1):
    """``times``: how often the prefix is read."""
    k_len, prefix_len, kv_heads = 90, 600, 2
    shape = dict(batch=batch, q_heads=group * kv_heads, kv_heads=kv_heads, q_len=q_len, k_len=k_len)
    load().take_copied_bytes()
    check_forward(**shape, prefix_len=prefix_len, head_dim=head_dim)
    keys_and_values = 2 * (times * prefix_len + batch * k_len) * kv_heads * head_dim * 2
    parts = 4  # each reads the queries
    queries = batch * group * kv_heads * q_len * head_dim * 2
    assert 0 < load().take_copied_bytes() - keys_and_values <= (parts + 1) * queries
