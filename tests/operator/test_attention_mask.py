"""Boolean and additive masks, broadcast every way, over the sequence or over prefix and sequence."""

import math

import pytest
import torch
from helpers import check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

B, HQ, HKV, SQ, SK, P = 3, 4, 2, 37, 50, 6
SHAPE = dict(batch=B, q_heads=HQ, kv_heads=HKV, q_len=SQ, k_len=SK, prefix_len=P, head_dim=32)

# Leading dimensions of a mask; its columns are added by the test.
BROADCAST_FORMS = [
    (), (1,), (SQ,), (1, 1), (1, SQ), (HQ, 1), (HQ, SQ), (1, 1, 1), (B, 1, 1), (1, HQ, 1), (1, 1, SQ), (B, HQ, 1),
    (B, 1, SQ), (1, HQ, SQ), (B, HQ, SQ),
]  # fmt: skip
MASK_KINDS = ["bool", torch.float32, "query"]


def random_mask(shape: tuple[int, ...], kind: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bool, or additive in the dtype ``kind`` ("query": ``dtype``) with some columns at minus infinity."""
    seen = torch.rand(shape) < 0.7
    if kind == "bool":
        return seen
    added = torch.randn(shape).masked_fill(~seen, -math.inf)
    return added.to(dtype if kind == "query" else kind)


@pytest.mark.parametrize("kind", MASK_KINDS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("columns", ["sequence", "prefix and sequence"])
@pytest.mark.parametrize("leading", BROADCAST_FORMS, ids=str)
def test_every_broadcast_form(leading, columns, is_causal, kind):
    mask = random_mask((*leading, SK if columns == "sequence" else P + SK), kind)
    check(make_call(**SHAPE, attn_mask=mask, is_causal=is_causal))


@pytest.mark.parametrize("kind", ["bool", torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (B, 1, 1, 1), (SQ, 1), (B, HQ, SQ, 1)], ids=str)
def test_one_column_is_broadcast_over_the_sequence_and_the_prefix_stays_visible(shape, kind):
    mask = random_mask(shape, kind)
    result = check(make_call(**SHAPE, attn_mask=mask))
    assert result.lse.isfinite().all()


@pytest.mark.parametrize("kind", ["bool", torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mask_of_every_dtype_on_queries_of_every_dtype(dtype, kind):
    check(make_call(**SHAPE, dtype=dtype, attn_mask=random_mask((B, 1, SQ, SK), kind)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_mask(is_causal, side, dtype):
    lengths = torch.tensor([0, 1, 37, 128, 200])[:, None]
    position = torch.arange(200)[None]
    seen = position < lengths if side == "right" else position >= 200 - lengths
    call = make_call(
        batch=5, q_len=200, prefix_len=20, head_dim=32, dtype=dtype, attn_mask=seen[:, None, None], is_causal=is_causal
    )
    check(call)


def test_keys_behind_a_mask_do_not_matter():
    seen = torch.arange(SK) < 31
    call = make_call(**SHAPE, attn_mask=seen)
    expected = run(call)
    call.inputs["key"][:, :, 31:] = 1e4
    call.inputs["value"][:, :, 31:] = 1e4
    got = run(call)
    assert torch.equal(got.out, expected.out) and torch.equal(got.grads["prefix_key"], expected.grads["prefix_key"])


@pytest.mark.parametrize("kind", ["bool", torch.float32])
def test_everything_masked_gives_zero_minus_infinity_and_no_gradient(kind):
    nothing = torch.zeros(P + SK, dtype=torch.bool)
    mask = nothing if kind == "bool" else torch.zeros(P + SK).masked_fill(~nothing, -math.inf)
    result = check(make_call(**SHAPE, attn_mask=mask))
    assert (result.lse == -math.inf).all()
    assert all((tensor == 0).all() for name, tensor in result.tensors().items() if name != "lse")


@pytest.mark.parametrize("kind", MASK_KINDS, ids=str)
def test_some_rows_fully_masked(kind):
    mask = random_mask((SQ, P + SK), kind)
    mask[5:20] = False if kind == "bool" else -math.inf
    result = check(make_call(**SHAPE, attn_mask=mask))
    assert (result.lse[:, :, 5:20] == -math.inf).all()


@pytest.mark.parametrize("kind", ["bool", torch.float32])
def test_mask_with_any_strides(kind):
    mask = random_mask((SK, SQ, HQ, B), kind).permute(3, 2, 1, 0)
    check(make_call(**SHAPE, attn_mask=mask))
    check(make_call(**SHAPE, attn_mask=random_mask((B, 1, SQ, 2 * SK), kind)[..., ::2]))


@pytest.mark.parametrize("kind", ["bool", torch.float32])
@pytest.mark.parametrize("columns", ["sequence", "prefix and sequence"])
def test_mask_over_a_composed_bank(columns, kind):
    """Columns are counted by whole prefixes: slot m begins at m * P whatever the valid lengths."""
    slots = 2
    mask = random_mask((B, 1, SQ, SK if columns == "sequence" else slots * P + SK), kind)
    ids = torch.tensor([[0, 1], [-1, 2], [2, 0]])
    check(make_call(**SHAPE, num_prefixes=3, attn_mask=mask, prefix_ids=ids, prefix_lens=torch.tensor([6, 2, 0])))


@pytest.mark.parametrize("kind", ["bool", torch.float32])
def test_mask_with_window_causal_offset_and_softcap(kind):
    call = make_call(
        **SHAPE,
        attn_mask=random_mask((B, 1, 1, SK), kind),
        is_causal=True,
        window_size=(20, -1),
        query_offset=5,
        softcap=3.0,
        window_includes_prefix=True,
    )
    check(call)


def test_large_negative_numbers_instead_of_minus_infinity():
    """What older Transformers models pass: the lowest number of the dtype, on some rows in every column."""
    mask = torch.where(torch.rand(B, 1, SQ, P + SK) < 0.5, 0.0, torch.finfo(torch.float32).min)
    mask[:, :, 3] = torch.finfo(torch.float32).min
    call = make_call(**SHAPE, attn_mask=mask)
    result = run(call)
    assert all(tensor.isfinite().all() for tensor in result.tensors().values())
    check(make_call(**SHAPE, attn_mask=mask.clamp(min=-100)))
