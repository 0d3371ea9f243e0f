"""One prefix for all rows, a bank with ids and valid lengths, several prefixes per row, a prefix for each row."""

import math

import pytest
import torch
from helpers import check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SHAPE = dict(q_heads=4, kv_heads=2, q_len=37, k_len=50, head_dim=32)
ID_DTYPES = [torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 2, 2], [1, -1, 0], [-1, -1, -1]], ids=str)
def test_each_row_names_its_prefix(ids, id_dtype, dtype):
    call = make_call(
        batch=3, **SHAPE, prefix_len=20, num_prefixes=3, dtype=dtype, prefix_ids=torch.tensor(ids, dtype=id_dtype)
    )
    result = check(call)
    for n in set(range(3)) - set(ids):
        assert (result.grads["prefix_key"][n] == 0).all() and (result.grads["prefix_value"][n] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize(
    "ids", [[[0], [1]], [[0, 1, 2], [2, 1, 0]], [[3, -1, 0], [-1, -1, -1]], [[1, 1, 1], [0, 0, -1]], [[], []]], ids=str
)
def test_several_prefixes_per_row(ids, id_dtype, is_causal):
    call = make_call(
        batch=2,
        **SHAPE,
        prefix_len=17,
        num_prefixes=4,
        is_causal=is_causal,
        prefix_ids=torch.tensor(ids, dtype=id_dtype),
    )
    check(call)


@pytest.mark.parametrize("order", ["strided", "expanded"])
def test_ids_with_any_strides(order):
    ids = torch.tensor([[0, 2, 1, 1], [1, 0, 2, 2]])[:, ::2] if order == "strided" else torch.tensor([1]).expand(2, 2)
    check(make_call(batch=2, **SHAPE, prefix_len=6, num_prefixes=3, prefix_ids=ids))
    check(make_call(batch=2, **SHAPE, prefix_len=6, num_prefixes=3, prefix_ids=ids[:, 0]))


def test_rows_may_leave_out_the_one_prefix():
    check(make_call(batch=3, **SHAPE, prefix_len=20, prefix_ids=torch.tensor([0, -1, 0])))


@pytest.mark.parametrize("num_prefixes", [1, 3])
def test_a_prefix_for_each_row_without_ids(num_prefixes):
    check(make_call(batch=num_prefixes, **SHAPE, prefix_len=20, num_prefixes=num_prefixes))


def test_one_prefix_equals_a_bank_of_one():
    one = run(make_call(batch=3, **SHAPE, prefix_len=20))
    bank = run(make_call(batch=3, **SHAPE, prefix_len=20, num_prefixes=1, prefix_ids=torch.zeros(3, dtype=torch.int64)))
    assert torch.equal(one.out, bank.out) and torch.equal(one.lse, bank.lse)
    assert torch.equal(one.grads["prefix_value"], bank.grads["prefix_value"][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("len_dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("lens", [[20, 1, 0], [7, 16, 19], [0, 0, 0]], ids=str)
def test_nan_beyond_the_valid_lengths_does_not_matter(lens, len_dtype, dtype):
    """``make_call`` writes NaN there; the gradient there is zero."""
    lens = torch.tensor(lens, dtype=len_dtype)
    call = make_call(
        batch=4,
        **SHAPE,
        prefix_len=20,
        num_prefixes=3,
        dtype=dtype,
        prefix_lens=lens,
        prefix_ids=torch.tensor([2, 0, 1, 0]),
    )
    assert call.inputs["prefix_key"].isnan().any()
    result = check(call)
    for n, length in enumerate(lens.tolist()):
        assert (result.grads["prefix_key"][n, :, length:] == 0).all()
        assert (result.grads["prefix_value"][n, :, length:] == 0).all()


def test_valid_length_of_one_prefix_for_all():
    check(make_call(batch=2, **SHAPE, prefix_len=20, prefix_lens=torch.tensor([13])))


def test_nan_in_a_prefix_that_no_row_names_does_not_matter():
    call = make_call(batch=2, **SHAPE, prefix_len=9, num_prefixes=3, prefix_ids=torch.tensor([0, 2]))
    expected = run(call)
    for name in ("prefix_key", "prefix_value"):
        call.inputs[name][1] = math.nan
    for name, tensor in run(call).tensors().items():
        assert torch.equal(tensor, expected.tensors()[name]), name


def test_many_rows_share_few_prefixes():
    ids = torch.arange(23) % 3
    check(make_call(batch=23, q_heads=2, q_len=5, k_len=3, prefix_len=33, num_prefixes=3, head_dim=32, prefix_ids=ids))


def test_a_bank_of_more_prefixes_than_rows():
    ids = torch.tensor([40, 3])
    check(make_call(batch=2, q_len=5, prefix_len=4, num_prefixes=64, head_dim=8, prefix_ids=ids))


def test_splitting_a_prefix_in_two_changes_nothing():
    whole = make_call(batch=2, **SHAPE, prefix_len=24)
    halves = make_call(batch=2, **SHAPE, prefix_len=12, num_prefixes=2, prefix_ids=torch.tensor([[0, 1], [0, 1]]))
    halves.inputs.update({name: whole.inputs[name] for name in ("query", "key", "value")})
    for name in ("prefix_key", "prefix_value"):
        halves.inputs[name] = torch.stack(whole.inputs[name].split(12, dim=1))
    halves.dout, halves.dlse = whole.dout, whole.dlse
    expected, got = run(whole), run(halves)
    torch.testing.assert_close(got.out, expected.out)
    for name in ("prefix_key", "prefix_value"):
        torch.testing.assert_close(torch.cat(list(got.grads[name]), dim=1), expected.grads[name])


def test_partial_attentions_merge_by_lse():
    """lse is differentiable: attention to the prefix and to the sequence, merged, is attention to both."""
    call = make_call(**SHAPE, prefix_len=20, dtype=torch.float64)

    def merged(query, key, value, prefix_key, prefix_value, return_lse):
        from prefix_kernels import prefix_attention

        nothing = key[:, :, :0]
        ours, lse = prefix_attention(query, key, value, return_lse=True)
        prefix_out, prefix_lse = prefix_attention(query, nothing, nothing, prefix_key, prefix_value, return_lse=True)
        total = torch.logaddexp(lse, prefix_lse)
        return ours * (lse - total).exp()[..., None] + prefix_out * (prefix_lse - total).exp()[..., None], total

    expected = run(call).tensors()
    for name, tensor in run(call, merged).tensors().items():
        torch.testing.assert_close(tensor, expected[name])
