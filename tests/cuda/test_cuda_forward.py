"""The tensor core kernels of the forward pass in the emulator against the oracle: every option, every edge of a tile,
few queries and many."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from emulated import emulated_prefix_attention, load
from helpers import check, make_call, run

from prefix_kernels.reference import dropout_keep

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = [torch.float16, torch.bfloat16]
EDGES = [0, 1, 15, 16, 17, 20, 63, 64, 65]
SEED = torch.tensor([5])

# The host code takes 128 rows to a block where that keeps every multiprocessor at work, else 64; and splits the keys of
# few queries into as many parts as the multiprocessors need.
FEW, MANY = 1, 1000

# Few queries are decoded by kernels of their own.
DECODE, LONG = 3, 150


@pytest.fixture(autouse=True)
def usual_device():
    load().device(80, MANY)


@pytest.fixture(params=[FEW, MANY], ids=["sm1", "sm1000"])
def multiprocessors(usual_device, request):
    load().device(80, request.param)


def check_forward(mode="fast", seed=0, **shape):
    defaults = dict(dtype=torch.float16, layout="aligned", head_dim=64, with_dlse=False)
    return check(
        make_call(**defaults | shape), needs=(), function=partial(emulated_prefix_attention, mode=mode, seed=seed)
    )


def some(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


# Of 2 batch rows, 4 heads, any number of queries, 170 keys and 20 prefix tokens.
K_LEN, PREFIX = 170, 20
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, later queries": {"is_causal": True, "query_offset": 40},
    "causal, earlier queries": {"is_causal": True, "query_offset": -5},
    "causal, offset for each row": {"is_causal": True, "query_offset": torch.tensor([3, -90], dtype=torch.int32)},
    "window": {"window_size": (5, 3)},
    "window on the diagonal": {"window_size": (0, 0)},
    "window to the left": {"window_size": (70, -1)},
    "window to the right": {"window_size": (-1, 7)},
    "causal window": {"is_causal": True, "window_size": (33, -1)},
    "window over the prefix": {"window_size": (140, 0), "window_includes_prefix": True},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.3},
    "scale zero": {"scale": 0.0},
    "softcap": {"softcap": 2.0},
    "padding": {"attn_mask": torch.arange(K_LEN) < torch.tensor([70, 170])[:, None, None, None]},
    "bool mask of every head": {"attn_mask": some(2, 4, 1, K_LEN) < 0.6},
    "mask over the prefix": {"attn_mask": some(2, 1, 1, PREFIX + K_LEN) < 0.6},
    "float mask": {"attn_mask": some(K_LEN)},
    "float16 mask": {"attn_mask": some(2, 1, 1, PREFIX + K_LEN).half()},
    "float64 mask with -inf": {"attn_mask": some(K_LEN).double().masked_fill(some(K_LEN) < 0.5, -math.inf)},
    "the least float as a mask": {
        "attn_mask": torch.where(torch.arange(K_LEN) < 90, 0.0, torch.finfo(torch.float32).min)
    },
    "mask of the least floats alone": {"attn_mask": torch.full((PREFIX + K_LEN,), torch.finfo(torch.float32).min)},
    "mask that hides the sequence": {"attn_mask": torch.zeros(K_LEN, dtype=torch.bool)},
    "mask that hides everything": {"attn_mask": torch.zeros(PREFIX + K_LEN, dtype=torch.bool)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([-5])},
    "softcap and dropout": {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": SEED},
    "everything dropped": {"dropout_p": 1.0, "dropout_seed": SEED},
    "one prefix for each row": {"num_prefixes": 2},
    "bank": {"num_prefixes": 3, "prefix_ids": torch.tensor([2, -1])},
    "bank with lengths": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([2, 1]),
        "prefix_lens": torch.tensor([20, 3, 16]),
    },
    "composed bank": {"num_prefixes": 3, "prefix_ids": torch.tensor([[2, 0, 2], [-1, 1, 1]], dtype=torch.int32)},
    "composed bank with lengths": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0, 2], [-1, 1, 1]]),
        "prefix_lens": torch.tensor([20, 0, 17]),
        "dropout_p": 0.3,
        "dropout_seed": SEED,
    },
    "composed bank with full lengths": {
        "num_prefixes": 2,
        "prefix_ids": torch.tensor([[0, 1], [1, 1]]),
        "prefix_lens": torch.tensor([16, 16]),
    },
    "bank that no row names": {"num_prefixes": 3, "prefix_ids": torch.tensor([[-1, -1], [-1, -1]])},
    "bank without slots": {"num_prefixes": 3, "prefix_ids": torch.zeros(2, 0, dtype=torch.int64)},
    "window over a composed bank": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0, 2], [-1, 1, 1]]),
        "prefix_lens": torch.tensor([20, 9, 17]),
        "is_causal": True,
        "window_size": (160, 0),
        "window_includes_prefix": True,
    },
    "all at once": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0], [-1, 1]]),
        "prefix_lens": torch.tensor([20, 0, 13]),
        "attn_mask": some(2, 4, 1, 2 * PREFIX + K_LEN),
        "is_causal": True,
        "window_size": (60, 2),
        "window_includes_prefix": True,
        "softcap": 3.0,
        "dropout_p": 0.2,
        "dropout_seed": SEED,
    },
}


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("q_len", [LONG, DECODE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options, dtype, q_len):
    check_forward(q_heads=4, kv_heads=2, q_len=q_len, k_len=K_LEN, prefix_len=PREFIX, dtype=dtype, **options)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("q_len", [LONG, DECODE])
def test_a_mask_for_every_row(q_len):
    check_forward(q_heads=4, kv_heads=2, q_len=q_len, k_len=K_LEN, attn_mask=some(2, 4, q_len, K_LEN) < 0.5)
    check_forward(q_len=q_len, k_len=K_LEN, attn_mask=some(q_len, K_LEN).bfloat16(), dtype=torch.bfloat16)


@pytest.mark.parametrize("prefix_len", EDGES)
@pytest.mark.parametrize("k_len", EDGES)
def test_every_edge_of_prefix_and_sequence(k_len, prefix_len):
    check_forward(q_len=70, k_len=k_len, prefix_len=prefix_len)
    check_forward(q_len=70, k_len=k_len, prefix_len=prefix_len, is_causal=True)
    check_forward(q_len=2, k_len=k_len, prefix_len=prefix_len, is_causal=True)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("q_len", [1, 15, 16, 17, 31, 33, 64, 65, 127, 129])
def test_every_number_of_queries(q_len):
    check_forward(q_len=q_len, prefix_len=16, is_causal=True)
    check_forward(q_len=q_len, k_len=100, prefix_len=None, attn_mask=some(100) < 0.5)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "poisoned", "aligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 20, 32, 40, 64, 72, 96, 100, 128, 160, 192, 250, 256])
def test_every_head_dim_and_layout(head_dim, dtype, layout):
    shape = dict(head_dim=head_dim, dtype=dtype, layout=layout)
    check_forward(batch=1, q_len=67, k_len=90, is_causal=True, **shape)
    check_forward(batch=1, q_len=40, k_len=40, softcap=3.0, **shape)
    check_forward(batch=1, q_len=5, k_len=160, **shape)


@pytest.mark.parametrize("q_len", [70, DECODE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_prefix_of_another_dtype_is_converted_on_load(prefix_dtype, dtype, q_len):
    check_forward(q_len=q_len, prefix_len=40, dtype=dtype, prefix_dtype=prefix_dtype)
    check_forward(q_len=q_len, prefix_len=200, dtype=dtype, prefix_dtype=prefix_dtype, head_dim=24)
    check_forward(q_len=q_len, prefix_len=40, dtype=dtype, prefix_dtype=prefix_dtype, head_dim=20)


@pytest.mark.parametrize("q_len", [70, DECODE])
@pytest.mark.parametrize("head_dim", [24, 64, 96, 128, 192, 256])
def test_a_long_prefix_of_another_dtype_in_every_head_dim(head_dim, q_len):
    check_forward(q_len=q_len, prefix_len=150, prefix_dtype=torch.float32, head_dim=head_dim, k_len=30)
    check_forward(q_len=q_len, prefix_len=150, prefix_dtype=torch.float64, head_dim=head_dim, k_len=30)


def strided_wide(tensor, *strides):
    """The same values, this many elements apart, in memory that is only taken where they stand."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=False))
    backing = torch.from_numpy(np.zeros(last + tensor.shape[-1], dtype=np.float16))
    return backing.as_strided(tensor.shape, (*strides, 1)).copy_(tensor)


@pytest.mark.parametrize("q_len", [40, DECODE])
@pytest.mark.parametrize(
    "strides", [(2**31 + 8, 0, 64), (0, 2**31 + 8, 64), (0, 0, 2**26)], ids=["batch", "head", "row"]
)
def test_offsets_beyond_32_bits(strides, q_len):
    shape = [2 if stride > 2**30 else 1 for stride in strides[:2]]
    call = make_call(shape[0], shape[1], q_len=q_len, k_len=40, head_dim=64, dtype=torch.float16, layout="contiguous")
    for name in ("query", "key", "value"):
        call.inputs[name] = strided_wide(call.inputs[name], *strides)
    check(call, function=emulated_prefix_attention)


@pytest.mark.parametrize(
    "name, lengths",
    [
        ("query", {"query": 2**31, "key": 3}),
        ("key", {"query": 3, "key": 2**31 + 5}),
        ("prefix_key", {"query": 3, "key": 3, "prefix": 2**31 + 5}),
    ],
)
def test_lengths_beyond_32_bits_are_refused(name, lengths):
    def zeros(length):
        return torch.zeros(1, 1, 1, 8, dtype=torch.float16).expand(1, 1, length, 8)

    prefixes = [zeros(lengths["prefix"])] * 2 if "prefix" in lengths else []
    with pytest.raises(ValueError, match=f"^{name}: expected at most 1073741824 .* got 2147483"):
        emulated_prefix_attention(zeros(lengths["query"]), zeros(lengths["key"]), zeros(lengths["key"]), *prefixes)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("q_len", [1, 4, 5, 19, 40])
@pytest.mark.parametrize("group", [2, 3, 8])
def test_heads_that_share_keys_share_a_tile(group, q_len):
    heads = dict(q_heads=2 * group, kv_heads=2, q_len=q_len, k_len=60)
    check_forward(**heads, is_causal=True)
    check_forward(**heads, attn_mask=some(2, 2 * group, q_len, 60) < 0.7)
    check_forward(**heads, dropout_p=0.2, dropout_seed=SEED)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("head_dim", [24, 64, 96, 128, 192, 256])
def test_dropout_in_every_head_dim(head_dim, slots):
    """Tiles within the prefix, across the seam, within the sequence and at its end, for kernels of 64 and 128 rows."""
    prefix_ids = torch.tensor([[1, 0], [0, -1]])[:, :slots]
    shape = dict(q_len=LONG, k_len=K_LEN, prefix_len=112, head_dim=head_dim, num_prefixes=2, prefix_ids=prefix_ids)
    check_forward(**shape, dropout_p=0.3, dropout_seed=SEED)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_mask_of_the_sequence_beside_tiles_of_the_prefix_alone(softcap, head_dim):
    mask = some(K_LEN)
    check_forward(q_len=LONG, k_len=K_LEN, prefix_len=150, head_dim=head_dim, attn_mask=mask, softcap=softcap)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_len", [LONG, 16])
def test_the_kept_elements_are_the_reference_s_bit_for_bit(q_len, is_causal):
    """With unit vectors as values the output is the matrix of probabilities itself."""
    prefix_len, k_len, seed = 20, 180, 123456789123
    basis = torch.eye(prefix_len + k_len, 256).half()
    query, key = torch.randn(1, 2, q_len, 256).half() / 9, torch.randn(1, 2, k_len, 256).half() / 9
    values = basis[:prefix_len].expand(2, -1, -1), basis[prefix_len:].expand(1, 2, -1, -1)
    out = emulated_prefix_attention(
        query,
        key,
        values[1].contiguous(),
        torch.randn(2, prefix_len, 256).half() / 9,
        values[0].contiguous(),
        is_causal=is_causal,
        dropout_p=0.25,
        dropout_seed=torch.tensor([seed]),
    )
    visible = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len if is_causal else k_len)
    for head in range(2):
        prefix, sequence = (
            dropout_keep(seed, 0.25, head, segment=segment, rows=q_len, columns=columns)
            for segment, columns in ((1, prefix_len), (0, k_len))
        )
        assert torch.equal(out[0, head, :, : prefix_len + k_len] != 0, torch.cat([prefix, sequence & visible], dim=1))


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("q_len", [LONG, DECODE])
@pytest.mark.parametrize(
    "options, seen",
    [
        ({"is_causal": True, "query_offset": 0}, lambda q_len: (0, q_len)),
        ({"window_size": (30, 10), "query_offset": 300}, lambda q_len: (270, 310 + q_len)),
    ],
    ids=["causal", "window"],
)
def test_tiles_that_no_query_sees_are_not_visited(options, seen, q_len):
    call = make_call(q_len=q_len, k_len=500, head_dim=64, dtype=torch.float16, with_dlse=False, **options)
    expected = run(call, emulated_prefix_attention, needs=()).out
    begin, end = seen(q_len)
    for name in ("key", "value"):
        call.inputs[name][:, :, : begin // 16 * 16] = math.nan
        call.inputs[name][:, :, (end + 15) // 16 * 16 :] = math.nan
    assert torch.equal(run(call, emulated_prefix_attention, needs=()).out, expected)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len, group", [(5, 4), (16, 2), (16, 3), (1, 17), (3, 16)])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"attn_mask": some(2, 1, 1, 300) < 0.9, "dropout_p": 0.2, "dropout_seed": SEED},
        {"num_prefixes": 3, "prefix_ids": torch.tensor([[2, 0], [-1, 2]]), "prefix_lens": torch.tensor([40, 0, 33])},
    ],
    ids=["causal", "mask and dropout", "bank"],
)
def test_few_queries_of_many_heads_take_several_blocks(options, q_len, group, dtype):
    check_forward(dtype=dtype, q_len=q_len, q_heads=2 * group, kv_heads=2, k_len=300, prefix_len=40, **options)


def as_mask(shown, kind):
    """A padding mask from the columns that it shows."""
    return shown if kind == "bool" else torch.zeros(shown.shape).masked_fill(~shown, -math.inf)


def hide_cells(tensor, shown):
    """NaN in each row of a cell of 16 that shows nothing; ``shown`` [..., rows] is of ``tensor`` [..., rows, D]."""
    rows = shown.shape[-1]
    cells = torch.nn.functional.pad(shown, (0, -rows % 16)).unflatten(-1, (-1, 16)).any(-1)
    tensor[~cells.repeat_interleave(16, -1)[..., :rows].expand(tensor.shape[:-1])] = math.nan


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("q_len", [LONG, DECODE])
@pytest.mark.parametrize("shown", [[(0, 300), (0, 3)], [(250, 270), (17, 160)], [(0, 0), (299, 300)]], ids=str)
def test_padding_is_neither_visited_nor_loaded(shown, q_len, kind, mode):
    keys = torch.arange(300)
    shown = torch.stack([(keys >= begin) & (keys < end) for begin, end in shown])[:, None, None]
    shape = dict(q_heads=2, kv_heads=1, q_len=q_len, k_len=300, prefix_len=PREFIX, head_dim=64, dtype=torch.float16)
    call = make_call(**shape, layout="aligned", with_dlse=False, attn_mask=as_mask(shown, kind))
    for name in ("key", "value"):
        hide_cells(call.inputs[name], shown[:, :, 0])
    load(mode).device(80, FEW)
    padded = run(call, partial(emulated_prefix_attention, mode=mode), needs=())
    for name in ("key", "value"):
        call.inputs[name].nan_to_num_()
    check(call, needs=(), function=lambda *_, **__: (padded.out, padded.lse))


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "dropout_seed": SEED}, {"is_causal": True}], ids=str)
def test_batch_rows_with_padding_beside_rows_with_holes(options, slots, kind):
    columns = torch.arange(slots * 70 + K_LEN)
    prefix, sequence = columns < slots * 70, columns - slots * 70
    shown = torch.stack(
        [
            prefix & (columns < slots * 70 - 13) | (sequence >= 9) & (sequence < 130),
            prefix & (columns >= 5) | (sequence >= 0),
            columns % 50 != 3,
            columns >= 0,
            prefix,
            columns < 0,
        ]
    )
    bank = dict(num_prefixes=2, prefix_ids=torch.tensor([[1, 0]] * 6)[:, :slots], prefix_lens=torch.tensor([64, 69]))
    mask = as_mask(shown[:, None, None], kind)
    check_forward(
        batch=6, q_heads=2, kv_heads=1, q_len=LONG, k_len=K_LEN, prefix_len=70, attn_mask=mask, **bank, **options
    )


@pytest.mark.parametrize("q_len", [LONG, DECODE])
@pytest.mark.parametrize("slots", [1, 2])
def test_padding_of_prefixes_is_neither_visited_nor_loaded(slots, q_len):
    """Slots of 70 columns of which the rows of the batch see others."""
    columns = torch.arange(slots * 70 + 40)
    shown = torch.stack([(columns >= 40) & (columns < slots * 70 - 20), columns >= slots * 70 - 50, columns >= 500])
    ids = torch.tensor([[1, 1], [1, 1], [1, 1]])[:, :slots]
    shape = dict(batch=3, q_heads=2, kv_heads=1, q_len=q_len, k_len=40, prefix_len=70, head_dim=64, dtype=torch.float16)
    bank = dict(num_prefixes=2, prefix_ids=ids, prefix_lens=torch.tensor([9, 69]))
    call = make_call(**shape, **bank, layout="aligned", with_dlse=False, attn_mask=shown[:, None, None])
    for name in ("prefix_key", "prefix_value"):
        hide_cells(call.inputs[name][1], shown[:, : slots * 70].reshape(-1, 70).any(0)[None])
    padded = run(call, emulated_prefix_attention, needs=())
    for name in ("prefix_key", "prefix_value"):
        call.inputs[name].nan_to_num_()
    check(call, needs=(), function=lambda *_, **__: (padded.out, padded.lse))


@pytest.mark.parametrize("q_len", [70, DECODE])
def test_the_same_call_gives_the_same_bits_in_any_order_of_warps(q_len):
    call = make_call(q_len=q_len, k_len=200, head_dim=64, dtype=torch.float16, with_dlse=False)
    first, *others = (
        run(call, partial(emulated_prefix_attention, seed=seed), needs=()).tensors() for seed in (0, 1, 2)
    )
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_the_output_is_laid_out_for_merging_heads():
    inputs = make_call(q_len=70, head_dim=64, dtype=torch.float16, layout="contiguous").inputs
    out = emulated_prefix_attention(**inputs)
    assert out.transpose(1, 2).is_contiguous()


CHECKED = {
    "plain": dict(q_len=70, k_len=80, prefix_len=20),
    "causal, two tiles of rows": dict(q_len=130, k_len=70, prefix_len=16, is_causal=True),
    "rows that see nothing": dict(q_len=40, k_len=30, prefix_len=None, is_causal=True, query_offset=-35),
    "no keys at all": dict(q_len=40, k_len=0, prefix_len=None),
    "packed heads": dict(q_len=9, q_heads=6, kv_heads=2, k_len=40, window_size=(7, 3)),
    "mask and dropout": dict(q_len=33, attn_mask=some(33, 33), dropout_p=0.3, dropout_seed=SEED),
    "unaligned": dict(q_len=33, layout="poisoned"),
    "prefix in float32": dict(q_len=40, prefix_len=150, prefix_dtype=torch.float32, is_causal=True),
    "prefix in float64": dict(q_len=40, prefix_len=150, prefix_dtype=torch.float64, head_dim=96),
    "head dim 128": dict(q_len=70, head_dim=128, is_causal=True),
    "head dim 256": dict(q_len=33, head_dim=250),
    "bank": dict(
        q_len=33,
        num_prefixes=3,
        prefix_ids=torch.tensor([[2, 0, 2], [-1, 1, 1]]),
        prefix_lens=torch.tensor([5, 0, 4]),
        dropout_p=0.3,
        dropout_seed=SEED,
    ),
    "decode": dict(q_len=1, k_len=400, q_heads=4, kv_heads=2),
    "decode, long prefix": dict(
        batch=9, q_len=3, k_len=10, prefix_len=600, num_prefixes=2, prefix_ids=torch.arange(9) % 3 - 1
    ),
    "decode, many heads": dict(q_len=11, q_heads=6, kv_heads=2, k_len=300, prefix_len=150, is_causal=True),
    "decode, shared prefix": dict(
        batch=17, q_heads=2, kv_heads=1, q_len=1, k_len=20, prefix_len=300, attn_mask=some(17, 2, 1, 320) < 0.8
    ),
    "decode, shared prefix of a wide block": dict(
        batch=21, q_heads=5, kv_heads=1, q_len=1, k_len=20, prefix_len=300, attn_mask=some(21, 5, 1, 320) < 0.8
    ),
    "decode, shared prefix in float32, head dim 256": dict(
        batch=9, q_heads=3, kv_heads=1, q_len=1, k_len=5, prefix_len=90, head_dim=256, prefix_dtype=torch.float32
    ),
    "decode, shared prefix of a wide block in float32, head dim 256": dict(
        batch=9, q_heads=5, kv_heads=1, q_len=1, k_len=5, prefix_len=90, head_dim=256, prefix_dtype=torch.float32
    ),
    "decode, no keys at all": dict(q_len=1, k_len=0, prefix_len=None),
    "decode, head dim 256": dict(q_len=2, k_len=90, head_dim=256, attn_mask=some(90)),
    "decode, prefix in float32": dict(q_len=2, k_len=20, prefix_len=150, prefix_dtype=torch.float32),
    "decode, unaligned": dict(q_len=2, k_len=90, layout="poisoned", prefix_dtype=torch.float32),
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", CHECKED.values(), ids=CHECKED)
def test_check_mode_finds_nothing(shape, seed):
    load("check").device(80, FEW if seed == 1 else MANY, counters=0 if seed == 3 else 1024)
    check_forward(mode="check", seed=seed, **shape)


@pytest.mark.parametrize("q_len", [DECODE, LONG])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prefix_ids": [0, 3]}, "prefix_ids: expected values from -1 to 2, got 3 at flat index 1"),
        ({"prefix_ids": [-2, 0]}, "prefix_ids: expected values from -1 to 2, got -2 at flat index 0"),
        ({"prefix_ids": [[0, -1], [2, 9]]}, "prefix_ids: expected values from -1 to 2, got 9 at flat index 3"),
        ({"prefix_lens": [5, 300, 2]}, "prefix_lens: expected values from 0 to 290, got 300 at flat index 1"),
        ({"prefix_lens": [5, 7, -1]}, "prefix_lens: expected values from 0 to 290, got -1 at flat index 2"),
    ],
    ids=["id too large", "id too small", "id of a second slot", "length too large", "length of a prefix of no row"],
)
@pytest.mark.parametrize("mode", ["fast", "check"])
def test_integers_out_of_range_are_refused_on_the_device(mode, changed, message, q_len, capfd):
    """Decoding checks the integers that it reads; ahead of other forward kernels another kernel does."""
    integers = {"prefix_ids": [0, 1], "prefix_lens": [5, 290, 2]} | changed
    call = make_call(
        q_len=q_len,
        k_len=40,
        prefix_len=290,
        num_prefixes=3,
        head_dim=64,
        dtype=torch.float16,
        **{name: torch.tensor(values) for name, values in integers.items()},
    )
    load(mode).device(80, MANY)
    for seed in range(3):
        with pytest.raises(RuntimeError, match="trap at"):
            emulated_prefix_attention(*call.inputs.values(), **call.options, mode=mode, seed=seed)
        # What a kernel prints stands in the buffer of the C library.
        load(mode).emulator.fflush(None)
        assert f"prefix_attention: {message}" in capfd.readouterr().out


@pytest.mark.parametrize("q_len", [DECODE, LONG])
def test_the_backward_pass_checks_the_integers_again(q_len, capfd):
    ids = torch.tensor([2, 0])
    bank = dict(prefix_len=290, num_prefixes=3, prefix_lens=torch.tensor([9, 0, 290]), prefix_ids=ids)
    call = make_call(q_len=q_len, k_len=40, head_dim=64, dtype=torch.float16, **bank)
    inputs = [tensor.requires_grad_() for tensor in call.inputs.values()]
    out = emulated_prefix_attention(*inputs, **call.options)
    ids.numpy()[1] = 3  # unseen by autograd
    with pytest.raises(RuntimeError, match="trap at"):
        out.sum().backward()
    load().emulator.fflush(None)
    expected = "prefix_attention: prefix_ids: expected values from -1 to 2, got 3 at flat index 1"
    assert expected in capfd.readouterr().out
