"""The backward kernels of 16-bit types in the emulator against the oracle: every set of gradients, option and edge."""

import itertools
from functools import partial

import pytest
import torch
from emulated import emulated_prefix_attention, load
from helpers import INPUT_NAMES, check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = [torch.float16, torch.bfloat16]
HEAD_DIMS = [32, 64, 96, 128, 192, 256]
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(INPUT_NAMES, size)]
EDGES = [0, 1, 15, 16, 17, 20, 63, 64, 65, 129]
BATCH, HEADS, Q_LEN, K_LEN, PREFIX = 2, 4, 70, 75, 20


def bernoulli(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.6


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (7, 3)},
    "window to the left": {"window_size": (20, -1)},
    "window to the right": {"window_size": (-1, 5)},
    "window over the prefix": {"window_size": (20, 0), "window_includes_prefix": True},
    "offset before the keys": {"is_causal": True, "query_offset": -40},
    "offset for each row": {"is_causal": True, "query_offset": torch.tensor([3, -90], dtype=torch.int32)},
    "negative scale": {"scale": -0.3},
    "softcap": {"softcap": 1.5},
    "padding": {"attn_mask": torch.arange(K_LEN)[None, None, None] < torch.tensor([40, 75])[:, None, None, None]},
    "bool mask": {"attn_mask": bernoulli(BATCH, HEADS, Q_LEN, K_LEN)},
    "mask of rows that see nothing": {"attn_mask": bernoulli(Q_LEN, 1)},
    "additive mask": {"attn_mask": normal(HEADS, Q_LEN, K_LEN, dtype=torch.float16)},
    "additive mask in float64": {"attn_mask": normal(Q_LEN, K_LEN, dtype=torch.float64)},
    "mask over the prefix": {
        "attn_mask": normal(BATCH, 1, 1, PREFIX + K_LEN).masked_fill(bernoulli(PREFIX + K_LEN), -torch.inf)
    },
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([-5])},
    "everything dropped": {"dropout_p": 1.0, "dropout_seed": torch.tensor([1])},
    "bank": {"num_prefixes": 3, "prefix_ids": torch.tensor([2, -1]), "prefix_lens": torch.tensor([20, 3, 17])},
    "composed bank": {"num_prefixes": 3, "prefix_ids": torch.tensor([[2, 0, 2], [-1, 1, 1]], dtype=torch.int32)},
    "bank without slots": {"num_prefixes": 3, "prefix_ids": torch.zeros(2, 0, dtype=torch.int64)},
    "one prefix for each row": {"num_prefixes": 2},
    "window over composed prefixes": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0, 2], [-1, 1, 1]]),
        "prefix_lens": torch.tensor([20, 9, 17]),
        "window_size": (30, 0),
        "window_includes_prefix": True,
    },
    "all at once": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0], [-1, 1]]),
        "prefix_lens": torch.tensor([20, 0, 13]),
        "attn_mask": normal(BATCH, HEADS, Q_LEN, 2 * PREFIX + K_LEN),
        "is_causal": True,
        "window_size": (19, 2),
        "window_includes_prefix": True,
        "softcap": 3.0,
        "dropout_p": 0.2,
        "dropout_seed": torch.tensor([9]),
    },
}


# Options that only two passes over the scores serve.
GENERAL = {name for name, option in OPTIONS.items() if option.keys() & {"attn_mask", "softcap", "dropout_p"}}
GENERAL |= {name for name, option in OPTIONS.items() if "window_includes_prefix" in option}


def backward_call(**shape):
    defaults = dict(batch=BATCH, q_heads=HEADS, kv_heads=2, q_len=Q_LEN, k_len=K_LEN, prefix_len=PREFIX)
    return make_call(**defaults | dict(head_dim=64, dtype=torch.float16, layout="contiguous") | shape)


def compiled_head_dim(call):
    return next(d for d in HEAD_DIMS if d >= max(call.inputs["query"].shape[-1], call.dout.shape[-1]))


def takes_one_pass(call):
    """Return True if the kernels form all gradients of the call in one pass over the scores, on a GPU like the A100."""
    options = {name for name, option in call.options.items() if option is not None and option is not False}
    general = {"attn_mask", "softcap", "dropout_p", "window_includes_prefix"}
    return compiled_head_dim(call) in (64, 96, 128) and not options & general


def check_emulated(call, needs=None, **options):
    """Check all gradients and, of calls that take one pass for them, also those of the kernels for fewer."""
    function = partial(emulated_prefix_attention, **options)
    check(call, needs=needs, function=function)
    if needs is None and takes_one_pass(call):
        for part in (("query",), tuple(name for name in call.names if name != "query")):
            check(call, needs=part, function=function)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_every_set_of_gradients(subset):
    check_emulated(backward_call(is_causal=True, q_len=33, k_len=40), needs=subset)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("subset", [subset for subset in SUBSETS if len(subset) == 1], ids="+".join)
def test_every_gradient_alone_in_wide_heads(subset, head_dim):
    check_emulated(backward_call(head_dim=head_dim, q_heads=2, q_len=33, k_len=40), needs=subset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, dtype):
    check_emulated(backward_call(dtype=dtype, **OPTIONS[option]))


@pytest.mark.parametrize("option", ["causal", "all at once"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_options_in_every_head_dim(head_dim, option):
    check_emulated(backward_call(head_dim=head_dim, **OPTIONS[option]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 1, 40, 63, 100, 250])
def test_every_head_dim(head_dim, dtype):
    check_emulated(backward_call(head_dim=head_dim, dtype=dtype, q_heads=2, q_len=35, k_len=70))


@pytest.mark.parametrize("layout", ["transposed", "poisoned"])
@pytest.mark.parametrize("head_dim", [64, 100, 256])
def test_strided_inputs(head_dim, layout):
    check_emulated(backward_call(head_dim=head_dim, layout=layout, q_len=35, is_causal=True))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("prefix_len", EDGES)
def test_prefixes_of_every_length(prefix_len, is_causal):
    call = backward_call(prefix_len=prefix_len, q_heads=2, kv_heads=1, q_len=37, k_len=33, is_causal=is_causal)
    check_emulated(call)


@pytest.mark.parametrize("prefix_len", [None, 20])
@pytest.mark.parametrize("k_len", EDGES)
def test_sequences_of_every_length(k_len, prefix_len):
    check_emulated(backward_call(prefix_len=prefix_len, q_heads=2, q_len=37, k_len=k_len, is_causal=True))


@pytest.mark.parametrize("head_dim", [32, 128, 192])
@pytest.mark.parametrize("q_len", [1, 15, 16, 17, 32, 33, 64, 65, 130])
def test_queries_of_every_number(q_len, head_dim):
    check_emulated(backward_call(q_len=q_len, q_heads=2, kv_heads=1, head_dim=head_dim, k_len=70, is_causal=True))


@pytest.mark.parametrize("prefix_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "poisoned"])
def test_prefix_in_another_dtype(layout, prefix_dtype):
    check_emulated(backward_call(dtype=torch.bfloat16, prefix_dtype=prefix_dtype, layout=layout, q_len=35))


@pytest.mark.parametrize("prefix_dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_long_prefix_in_another_dtype_in_every_head_dim(head_dim, prefix_dtype):
    shape = dict(head_dim=head_dim, q_heads=2, kv_heads=1, q_len=35, k_len=20, prefix_len=150)
    check_emulated(backward_call(**shape, prefix_dtype=prefix_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_the_least_float_masks_have_the_gradients_of_equal_probabilities(dtype):
    """Rows of padding, as model libraries write their masks."""
    mask = torch.where(torch.arange(Q_LEN)[:, None] < 20, torch.finfo(torch.float32).min, 0.0)
    check_emulated(backward_call(attn_mask=mask.expand(Q_LEN, PREFIX + K_LEN), dtype=dtype))


@pytest.mark.parametrize("kind", ["bool", "additive", "for each head"])
@pytest.mark.parametrize("shown", [[(0, 200), (0, 3)], [(150, 170), (17, 160)], [(0, 0), (199, 200)]], ids=str)
def test_padding_on_either_side(shown, kind):
    keys = torch.arange(200)
    mask = torch.stack([(keys >= begin) & (keys < end) for begin, end in shown])[:, None, None]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    elif kind == "for each head":
        mask = mask & (bernoulli(HEADS, 1, 1) | (keys < 100))
    call = backward_call(q_len=35, k_len=200, attn_mask=mask, is_causal=kind == "bool", query_offset=180)
    check_emulated(call)
    check_emulated(call, needs=("key",))


def test_query_tiles_that_see_padding_alone_are_not_visited():
    """Queries on the diagonal of keys that the mask hides: nothing of them is read."""
    shown = torch.stack([torch.arange(260) < 40, torch.arange(260) >= 400])[:, None, None]
    call = backward_call(q_len=260, k_len=260, prefix_len=None, window_size=(3, 0), attn_mask=shown, with_dlse=False)
    expected = run(call, emulated_prefix_attention).tensors()
    for tensor in (call.inputs["query"], call.dout):
        tensor[0, :, 128:] = torch.nan
        tensor[1] = torch.nan
    for name, got in run(call, emulated_prefix_attention).tensors().items():
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize(
    "options, unseen, columns",
    [({"is_causal": True}, slice(0, 128), slice(128, 260)), ({"window_size": (3, 0)}, slice(128, 260), slice(0, 64))],
    ids=["causal", "window"],
)
def test_query_tiles_that_see_none_of_the_columns_are_not_visited(options, unseen, columns):
    call = backward_call(q_len=260, k_len=260, with_dlse=False, **options)
    expected = run(call, emulated_prefix_attention, needs=("key", "value")).grads
    for tensor in (call.inputs["query"], call.dout):
        tensor[:, :, unseen] = torch.nan
    grads = run(call, emulated_prefix_attention, needs=("key", "value")).grads
    for name in ("key", "value"):
        assert torch.equal(grads[name][:, :, columns], expected[name][:, :, columns]), name


@pytest.mark.parametrize(
    "options, unseen, rows",
    [({"is_causal": True}, slice(128, 260), slice(0, 128)), ({"window_size": (3, 0)}, slice(0, 64), slice(128, 260))],
    ids=["causal", "window"],
)
def test_columns_that_none_of_the_queries_see_are_not_visited(options, unseen, rows):
    call = backward_call(q_len=260, k_len=260, with_dlse=False, **options)
    expected = run(call, emulated_prefix_attention, needs=("query",)).grads["query"]
    for name in ("key", "value"):
        call.inputs[name][:, :, unseen] = torch.nan
    got = run(call, emulated_prefix_attention, needs=("query",)).grads["query"]
    assert torch.equal(got[:, :, rows], expected[:, :, rows])


@pytest.mark.parametrize(
    "options, queries, columns",
    [({"is_causal": True}, slice(0, 128), slice(128, 260)), ({"window_size": (3, 0)}, slice(192, 260), slice(0, 128))],
    ids=["causal", "window"],
)
def test_tiles_that_do_not_see_each_other_do_not_meet_in_one_pass(options, queries, columns):
    call = backward_call(q_len=260, k_len=260, with_dlse=False, **options)
    expected = run(call, emulated_prefix_attention).grads
    saved = {name: tensor.clone() for name, tensor in call.inputs.items()}, call.dout.clone()
    call.inputs["query"][:, :, queries] = call.dout[:, :, queries] = torch.nan
    grads = run(call, emulated_prefix_attention).grads
    for name in ("key", "value"):
        assert torch.equal(grads[name][:, :, columns], expected[name][:, :, columns]), name
    call.inputs, call.dout = saved
    call.inputs["key"][:, :, columns] = call.inputs["value"][:, :, columns] = torch.nan
    got = run(call, emulated_prefix_attention).grads["query"]
    assert torch.equal(got[:, :, queries], expected["query"][:, :, queries])


@pytest.mark.parametrize("slots", [1, 2])
def test_query_tiles_of_rows_that_hide_a_prefix_are_not_visited(slots):
    shown = torch.arange(slots * 70) < torch.tensor([[slots * 70], [(slots - 1) * 70]])
    ids = torch.tensor([[1, 0], [0, 1]])[:, -slots:]
    shape = dict(prefix_len=70, num_prefixes=2, prefix_ids=ids, k_len=0, with_dlse=False)
    call = backward_call(**shape, attn_mask=shown[:, None, None])
    needs = ("prefix_key", "prefix_value")
    check_emulated(call, needs=needs)
    if slots == 1:
        expected = run(call, emulated_prefix_attention, needs=needs).tensors()
        for tensor in (call.inputs["query"], call.dout):
            tensor[1] = torch.nan
        for name, got in run(call, emulated_prefix_attention, needs=needs).tensors().items():
            assert torch.equal(got, expected[name]), name


def test_no_gradient_of_lse():
    check_emulated(backward_call(with_dlse=False))


@pytest.fixture
def many_multiprocessors():
    """A GPU so large that a prefix's visits are split over as many blocks as are worth it."""
    load().device(90, 4096)
    yield
    load().device(80, 4)


SPLIT = {
    "one prefix": {},
    "bank": {"num_prefixes": 3, "prefix_ids": torch.arange(40) % 4 - 1, "prefix_lens": torch.tensor([20, 3, 20])},
    "composed": {"num_prefixes": 2, "prefix_ids": torch.arange(120).reshape(40, 3) % 3 - 1},
    "one for each row": {"num_prefixes": 40},
    "window over the prefix": {"window_size": (15, -1), "window_includes_prefix": True},
}


@pytest.mark.parametrize("needs", [("prefix_value",), ("prefix_key", "prefix_value")], ids="+".join)
@pytest.mark.parametrize("name", SPLIT)
def test_prefixes_split_over_blocks(name, needs, many_multiprocessors):
    call = backward_call(batch=40, q_heads=2, kv_heads=1, q_len=67, k_len=3, head_dim=32, **SPLIT[name])
    check_emulated(call, needs=needs)


def copied_bytes(call, needs):
    """Return the bytes that cp.async reads in the backward pass: fewer, where one tile serves more products."""
    run(call, emulated_prefix_attention, needs=())
    load().take_copied_bytes()
    run(call, emulated_prefix_attention, needs=())
    forward = load().take_copied_bytes()
    run(call, emulated_prefix_attention, needs=needs)
    return load().take_copied_bytes() - forward


SEQUENCE = ("query", "key", "value")


@pytest.mark.parametrize(
    ("one_pass", "needs", "shape", "architecture"),
    [
        *((head_dim in (64, 96, 128), INPUT_NAMES, {"head_dim": head_dim}, 80) for head_dim in HEAD_DIMS),
        *((head_dim == 64, INPUT_NAMES, {"head_dim": head_dim}, 86) for head_dim in (64, 96, 128)),
        (True, INPUT_NAMES, {"head_dim": 128}, 90),
        (True, INPUT_NAMES, {"head_dim": 24, "value_dim": 64}, 80),
        *((True, needs, {}, 80) for needs in SUBSETS if needs[:3] == SEQUENCE),
        # Prefixes of several blocks of columns: for shorter ones alone, out is copied as well.
        *((False, needs, {"prefix_len": 150}, 80) for needs in SUBSETS if "query" in needs and needs[:3] != SEQUENCE),
        *((name not in GENERAL, INPUT_NAMES, option, 80) for name, option in OPTIONS.items()),
    ],
)
def test_one_pass_over_the_scores_or_two(one_pass, needs, shape, architecture):
    call = backward_call(**{"q_len": 40} | shape if "attn_mask" not in shape else shape)
    load().device(architecture, 4)
    try:
        apart = [copied_bytes(call, part) for part in (("query",), tuple(name for name in needs if name != "query"))]
        together = copied_bytes(call, needs)
    finally:
        load().device(80, 4)
    # Two passes copy for all gradients what they copy for the queries' and for the others.
    assert (together == sum(apart)) != one_pass, (together, apart)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("subset", [subset for subset in SUBSETS if subset[:3] == SEQUENCE], ids="+".join)
def test_sets_of_gradients_in_one_pass(subset, head_dim):
    ids = torch.tensor([[2, 0, 2], [-1, 1, 2]])
    bank = dict(num_prefixes=3, prefix_ids=ids, prefix_lens=torch.tensor([20, 5, 150]), prefix_len=150)
    check_emulated(backward_call(head_dim=head_dim, q_len=33, k_len=40, **bank), needs=subset)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in GENERAL])
def test_many_tiles_in_one_pass(option, many_multiprocessors):
    """Several blocks of columns add to every tile of queries, in an order that they must agree on."""
    options = {**OPTIONS[option], "prefix_len": 150}
    if "prefix_lens" in options:
        options["prefix_lens"] = torch.tensor([150, 3, 129])
    call = backward_call(q_heads=2, q_len=200, k_len=300, **options)
    check(call, function=emulated_prefix_attention)


@pytest.mark.parametrize("option", ["causal", "composed bank", "all at once"])
def test_gradients_repeat_bit_for_bit(option, many_multiprocessors):
    """Whatever the order of blocks and warps."""
    call = backward_call(**OPTIONS[option] | ({} if option == "all at once" else {"q_len": 150, "k_len": 300}))
    expected = run(call, emulated_prefix_attention).tensors()
    for seed in (1, 2):
        for name, tensor in run(call, partial(emulated_prefix_attention, seed=seed)).tensors().items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("option", ["causal", "composed bank"])
def test_blocks_that_run_at_the_same_time_add_in_the_same_order(option):
    """Blocks of one pass wait for each other's turns, whichever starts first."""
    call = backward_call(q_len=130, k_len=600, **OPTIONS[option])
    expected = run(call, emulated_prefix_attention).tensors()
    load().threads(4)
    try:
        for seed in range(4):
            for name, tensor in run(call, partial(emulated_prefix_attention, seed=seed)).tensors().items():
                assert torch.equal(tensor, expected[name]), name
    finally:
        load().threads(1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("option", ["causal", "composed bank", "all at once"])
def test_no_races_or_stray_accesses(option, seed, many_multiprocessors):
    check_emulated(backward_call(**OPTIONS[option]), mode="check", seed=seed)


@pytest.mark.parametrize("prefix_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "poisoned"])
@pytest.mark.parametrize("head_dim", [32, 128, 192, 256])
def test_no_races_or_stray_accesses_in_every_head_dim(head_dim, layout, prefix_dtype):
    call = backward_call(head_dim=head_dim, q_heads=2, q_len=17, k_len=70, layout=layout, prefix_dtype=prefix_dtype)
    check_emulated(call, mode="check", seed=3)
