"""Which keys a query sees: the causal diagonal, where the queries stand, windows around them; and softcap."""

import pytest
import torch
from helpers import check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

HALF = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "q_len, k_len",
    [(1, 1), (16, 16), (17, 33), (33, 17), (64, 65), (65, 64), (130, 130), (5, 300), (300, 5), (200, 260)],
)
def test_causal_diagonal_ends_at_the_bottom_right(q_len, k_len, dtype):
    check(make_call(q_len=q_len, k_len=k_len, prefix_len=6, head_dim=32, dtype=dtype, is_causal=True))


@pytest.mark.parametrize("prefix_len", [None, 0, 20])
def test_first_queries_of_a_tall_causal_problem_see_only_the_prefix(prefix_len):
    result = check(make_call(q_len=150, k_len=20, prefix_len=prefix_len, head_dim=32, is_causal=True))
    blind = result.lse[..., :130] == -torch.inf
    assert blind.all() if not prefix_len else not blind.any()


@pytest.mark.parametrize("offset", [-300, -129, -17, -1, 0, 1, 13, 16, 100, 129, 10**6, 2**40])
@pytest.mark.parametrize("window", [(-1, -1), (7, 3)])
def test_query_offset_moves_the_diagonal(offset, window):
    call = make_call(
        q_len=50, k_len=130, prefix_len=6, head_dim=32, is_causal=True, query_offset=offset, window_size=window
    )
    check(call)


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_size": (9, 2)}], ids=str)
def test_query_offset_per_row(options, offset_dtype):
    offsets = torch.tensor([-60, -3, 0, 16, 111], dtype=offset_dtype)
    check(make_call(batch=5, q_len=50, k_len=130, prefix_len=6, head_dim=32, query_offset=offsets, **options))


def test_query_offset_without_causal_or_window_changes_nothing():
    shape = dict(q_len=20, k_len=30)
    assert torch.equal(run(make_call(**shape, query_offset=7)).out, run(make_call(**shape)).out)


def test_causal_rows_do_not_depend_on_later_keys():
    call = make_call(q_len=70, k_len=70, head_dim=32, is_causal=True)
    before = run(call, needs=()).out
    call.inputs["key"][:, :, 40:] = 100.0
    call.inputs["value"][:, :, 40:] = -100.0
    after = run(call, needs=()).out
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(before[:, :, 40:], after[:, :, 40:])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [(2**63 - 1, 2**63 - 1), (2**63 - 1, -1), (-1, 2**63 - 2), (2**31, 2**32)])
def test_the_largest_numbers_are_no_limit(window, is_causal):
    shape = dict(q_len=20, k_len=30, is_causal=is_causal)
    assert torch.equal(run(make_call(**shape, window_size=window)).out, run(make_call(**shape)).out)


@pytest.mark.parametrize("includes_prefix", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "window", [(0, 0), (0, -1), (-1, 0), (1, 1), (16, 16), (31, 0), (17, 200), (200, 17), (128, 128)]
)
def test_windows(window, is_causal, includes_prefix):
    call = make_call(
        q_len=150,
        k_len=170,
        prefix_len=20,
        head_dim=32,
        window_size=window,
        is_causal=is_causal,
        window_includes_prefix=includes_prefix,
    )
    check(call)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("left", [0, 3, 15, 16, 40, 400])
def test_window_that_counts_the_prefix_as_positions(left, dtype):
    """Query 0 stands right after the prefix and sees ``left`` of its last tokens."""
    call = make_call(
        q_len=40,
        k_len=40,
        prefix_len=35,
        head_dim=32,
        dtype=dtype,
        is_causal=True,
        window_size=(left, -1),
        window_includes_prefix=True,
    )
    check(call)


@pytest.mark.parametrize("includes_prefix", [False, True])
@pytest.mark.parametrize("window", [(5, 0), (40, 8)])
def test_windows_over_a_composed_bank(window, includes_prefix):
    call = make_call(
        batch=4,
        q_len=40,
        k_len=44,
        prefix_len=17,
        num_prefixes=3,
        head_dim=32,
        window_size=window,
        window_includes_prefix=includes_prefix,
        prefix_ids=torch.tensor([[0, 1], [-1, 2], [2, -1], [-1, -1]]),
        prefix_lens=torch.tensor([17, 4, 0]),
    )
    check(call)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (10, 4)}], ids=str)
def test_softcap(softcap, options, dtype):
    call = make_call(
        q_heads=4, kv_heads=2, q_len=40, k_len=55, prefix_len=9, head_dim=32, dtype=dtype, softcap=softcap, **options
    )
    check(call)


def test_rows_that_see_nothing_give_zero_minus_infinity_and_no_gradient():
    call = make_call(batch=1, q_heads=1, q_len=30, k_len=10, prefix_len=None, is_causal=True)
    result = check(call)
    assert (result.lse[..., :20] == -torch.inf).all() and result.lse[..., 20:].isfinite().all()
    assert (result.out[..., :20, :] == 0).all() and (result.grads["query"][..., :20, :] == 0).all()
