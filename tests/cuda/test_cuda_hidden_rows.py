"""Rows that a finite mask hides everywhere, by the CUDA kernels in the emulator: their gradients are those of 1/N."""

from functools import partial

import pytest
import torch
from emulated import emulated_prefix_attention, load
from helpers import INPUT_NAMES, check, make_call, run

from prefix_kernels.reference import prefix_attention_reference

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

Q_LEN, K_LEN, PREFIX = 70, 75, 20
HIDDEN_ROWS = 23  # a tile of 16 rows, and a part of the next
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LEAST_FLOAT = torch.finfo(torch.float32).min
HIDING = {"-1e9": -1e9, "-1e30": -1e30, "least float32": LEAST_FLOAT, "least float16": -65504.0, "-1e4": -1e4}

# Few queries are decoded by kernels of their own, which merge the parts of a row.
Q_LENS = pytest.mark.parametrize("q_len", [1, 2, Q_LEN], ids=["one query", "two queries", "many queries"])


def hidden_call(q_len=Q_LEN, number=LEAST_FLOAT, hidden_rows=HIDDEN_ROWS, **shape):
    """The mask is ``number`` in all columns of the first rows, those of the prefix too."""
    mask = torch.where(torch.arange(q_len)[:, None] < hidden_rows, number, 0.0).expand(q_len, PREFIX + K_LEN)
    defaults = dict(q_heads=4, kv_heads=2, k_len=K_LEN, prefix_len=PREFIX, head_dim=64, layout="contiguous")
    return make_call(**defaults | shape, q_len=q_len, attn_mask=mask)


@pytest.fixture
def usual_device():
    yield
    load().device(80, 4)


@pytest.mark.parametrize("sm_count", [1, 1000], ids=["sm1", "sm1000"])
@pytest.mark.parametrize("number", ["-1e9", "least float32"])
@Q_LENS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_hidden_rows_are_those_of_the_eager_formula(dtype, q_len, number, sm_count, usual_device):
    """The eager formula of float32 loses the scores beside such a mask, so that every probability is 1/N."""
    load().device(80, sm_count)
    # One of two queries is hidden, so that a row's factor must be its own.
    call = hidden_call(q_len, HIDING[number], hidden_rows=1 if q_len == 2 else HIDDEN_ROWS, dtype=dtype)
    ours = run(call, emulated_prefix_attention)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    call.inputs = {name: tensor.to(wide) for name, tensor in call.inputs.items()}
    expected = run(call, prefix_attention_reference)
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for name in INPUT_NAMES:
        scale = expected.grads[name].abs().max()
        error = (ours.grads[name].to(wide) - expected.grads[name]).abs().max()
        assert error <= bound * scale, f"d{name}: error {error:.3g} exceeds {bound} of the largest, {scale:.3g}"


# -1e9 is beyond float16, in which the eager formula would hide the row for good.
@Q_LENS
@pytest.mark.parametrize(
    ("dtype", "number"),
    [(dtype, number) for dtype in DTYPES[:3] for number in HIDING]
    + [(torch.float16, "least float16"), (torch.float16, "-1e4")],
    ids=str,
)
def test_hidden_rows_follow_the_rule_of_tolerance(dtype, number, q_len):
    check(hidden_call(q_len, HIDING[number], dtype=dtype), function=emulated_prefix_attention)


@pytest.mark.parametrize("head_dim", [20, 32, 96, 128, 192, 256])
@Q_LENS
def test_hidden_rows_in_every_head_dim(q_len, head_dim):
    call = hidden_call(q_len, head_dim=head_dim, dtype=torch.bfloat16)
    check(call, function=emulated_prefix_attention)


@Q_LENS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_a_hidden_row_add_up_to_one(dtype, q_len):
    """dvalue summed over the keys is dout, whatever the probabilities are."""
    call = hidden_call(q_len, dtype=dtype, with_dlse=False)
    call.dout = call.dout.sign()
    grads = run(call, emulated_prefix_attention, needs=("value", "prefix_value")).grads
    summed = grads["value"].double().sum((0, 2)) + grads["prefix_value"].double().sum(1)
    expected = call.dout.sum((0, 2)).unflatten(0, (2, 2)).sum(1)
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(summed, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("q_len", [2, 35])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_races_or_stray_accesses(dtype, q_len, seed):
    """row_mass stands in shared memory behind lse, and is a result of its own in global memory."""
    number = -1e4 if dtype == torch.float16 else LEAST_FLOAT
    call = hidden_call(q_len, number, q_heads=2, kv_heads=1, head_dim=40, layout="poisoned", dtype=dtype)
    check(call, function=partial(emulated_prefix_attention, mode="check", seed=seed))
