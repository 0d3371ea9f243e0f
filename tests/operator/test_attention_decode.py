"""Few queries against many keys, and calls of so few queries that their keys are divided among the threads."""

import math

import pytest
import torch
from helpers import LAYOUTS, check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Query heads, key heads, queries: one alone, a group in one block, as many as a block of any instruction set takes or
# one more, several to a head.
QUERIES = [(3, 3, 1), (8, 2, 1), (8, 1, 1), (9, 1, 1), (2, 2, 3), (4, 2, 4), (2, 1, 2)]
DECODING = dict(q_heads=8, kv_heads=2, q_len=1, k_len=75, prefix_len=20, head_dim=32, is_causal=True)


def forward(**shape):
    return check(make_call(**shape), needs=())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_heads, kv_heads, q_len", QUERIES)
def test_few_queries(q_heads, kv_heads, q_len, dtype):
    forward(q_heads=q_heads, kv_heads=kv_heads, q_len=q_len, k_len=70, prefix_len=20, head_dim=64, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 8, 16, 33, 80, 100, 128, 256])
def test_few_queries_of_every_head_dim(head_dim, dtype):
    forward(q_heads=6, kv_heads=2, q_len=1, k_len=70, prefix_len=20, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("prefix_len", [0, 1, 20, 33])
@pytest.mark.parametrize("k_len", [0, 1, 3, 15, 16, 17, 31, 32, 33, 64, 65, 300])
def test_few_queries_around_the_edges_of_a_tile(k_len, prefix_len):
    forward(q_heads=4, kv_heads=2, q_len=1, k_len=k_len, prefix_len=prefix_len, head_dim=32)


@pytest.mark.parametrize("prefix_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries_read_a_prefix_of_another_dtype(dtype, prefix_dtype):
    forward(**DECODING, dtype=dtype, prefix_dtype=prefix_dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [32, 40, 1024 // 8])
def test_few_queries_in_every_layout(layout, head_dim):
    forward(**DECODING | {"head_dim": head_dim}, layout=layout)


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"query_offset": 30},
        {"query_offset": torch.tensor([50, -5])},
        {"window_size": (20, 0)},
        {"window_size": (80, 0), "window_includes_prefix": True},
        {"softcap": 5.0},
        {"scale": 0.3},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_few_queries(options, q_len):
    forward(**DECODING | {"q_len": q_len}, **options)


@pytest.mark.parametrize("over_prefix", [False, True], ids=["sequence", "prefix and sequence"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 8, 1), (2, 8, 3), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_few_queries(kind, shape, over_prefix):
    columns = 75 + (20 if over_prefix else 0)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(*shape, columns, generator=generator)
    mask = mask < 0.6 if kind == "bool" else mask.masked_fill(mask < 0.3, -math.inf)
    mask[..., 40:75] = False if kind == "bool" else -math.inf
    forward(**DECODING | {"q_len": 3, "kv_heads": 4}, attn_mask=mask)


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("hidden", [slice(70, 75), slice(0, 32), slice(33, 75)], ids=str)
def test_nan_in_rows_that_the_mask_hides_at_the_ends_does_not_matter(hidden, q_len):
    """What a static cache holds behind its valid rows, or padding on the left, there to whole cells of 16 rows."""
    mask = torch.ones(2, 1, 1, 75, dtype=torch.bool)
    mask[..., hidden] = False
    expected = forward(**DECODING | {"q_len": q_len, "kv_heads": 4}, attn_mask=mask)
    call = make_call(**DECODING | {"q_len": q_len, "kv_heads": 4}, attn_mask=mask)
    for name in ("key", "value"):
        call.inputs[name][:, :, hidden] = math.nan
    result = run(call, needs=())
    assert torch.equal(result.out, expected.out) and torch.equal(result.lse, expected.lse)


def test_few_queries_with_a_bank():
    ids = torch.tensor([[2, 0], [-1, 1], [-1, -1]])
    forward(**DECODING, batch=3, num_prefixes=3, prefix_ids=ids, prefix_lens=torch.tensor([20, 7, 0]))


def test_few_queries_that_see_nothing():
    result = forward(**DECODING | {"prefix_len": 0}, query_offset=torch.tensor([-1, 10]))
    assert (result.out[0] == 0).all() and (result.lse[0] == -math.inf).all()


def test_scores_that_rise_from_tile_to_tile():
    call = make_call(q_heads=4, kv_heads=2, q_len=1, k_len=300, head_dim=32)
    call.inputs["key"] *= torch.linspace(0, 40, 300)[:, None]
    check(call, needs=())


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_len", [1, 20, 64, 70])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window_size": (700, 3)}], ids=["full", "causal", "window"]
)
def test_keys_divided_among_threads(options, q_len, dtype):
    shape = dict(batch=1, q_heads=2, kv_heads=1, q_len=q_len, k_len=1500, prefix_len=260, head_dim=16, dtype=dtype)
    first = forward(**shape, **options)
    again = run(make_call(**shape, **options), needs=())
    assert torch.equal(first.out, again.out) and torch.equal(first.lse, again.lse)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("q_len", [1, 20])
@pytest.mark.parametrize("lens", [[300, 7, 259], [0, 256, 1]], ids=str)
def test_prefixes_of_every_length_divided_among_threads(lens, q_len):
    shape = dict(batch=1, q_heads=1, q_len=q_len, k_len=700, prefix_len=300, num_prefixes=3, head_dim=16)
    forward(**shape, prefix_ids=torch.tensor([[2, 0, 1]]), prefix_lens=torch.tensor(lens))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("q_len", [1, 20])
def test_divided_keys_that_padding_hides(q_len):
    """Parts whose every column is hidden count nothing, and a row that sees nothing gives zero."""
    mask = torch.zeros(2, 1, 1, 2000, dtype=torch.bool)
    mask[0, ..., 900:1000] = True
    result = forward(batch=2, q_heads=1, q_len=q_len, k_len=2000, prefix_len=0, head_dim=16, attn_mask=mask)
    assert (result.out[1] == 0).all() and (result.lse[1] == -math.inf).all()


@pytest.mark.usefixtures("three_threads")
def test_dropout_does_not_depend_on_how_keys_are_divided():
    call = make_call(batch=1, q_heads=1, q_len=40, k_len=1500, head_dim=16, dropout_p=0.3, dropout_seed=torch.tensor(5))
    check(call, needs=())
