"""Rows that a finite mask hides everywhere: their probabilities are the oracle's, forward and backward."""

import pytest
import torch
from helpers import INPUT_NAMES, check, make_call, run

from prefix_kernels.reference import prefix_attention_reference

HIDING = {
    "-1e9": -1e9,
    "-1e30": -1e30,
    "least float32": torch.finfo(torch.float32).min,
    "least float16": float(torch.finfo(torch.float16).min),
    "-1e4": -1e4,
}
SHAPE = dict(q_heads=4, kv_heads=2, q_len=21, k_len=30, prefix_len=20, head_dim=32)
HIDDEN_ROWS = 7


def hiding_mask(number):
    """A mask of which the first rows are ``number`` everywhere, over the prefix too."""
    return torch.where(torch.arange(21)[:, None] < HIDDEN_ROWS, number, 0.0).expand(21, 50)


@pytest.mark.parametrize("needs", [INPUT_NAMES, ("prefix_key", "prefix_value"), ("prefix_value",)], ids="+".join)
@pytest.mark.parametrize("number", HIDING.values(), ids=HIDING)
def test_gradients_of_rows_hidden_everywhere_are_those_of_the_eager_formula(number, needs):
    """The eager formula of float32 loses the scores beside such a mask, so that every probability is 1/N."""
    call = make_call(**SHAPE, layout="contiguous", attn_mask=hiding_mask(number))
    ours = run(call, needs=needs)
    expected = run(call, prefix_attention_reference, needs=needs)
    for name in needs:
        scale = expected.grads[name].abs().max()
        torch.testing.assert_close(ours.grads[name] / scale, expected.grads[name] / scale, rtol=0, atol=5e-3)


# -1e9 is beyond float16, in which the eager formula would hide the row for good.
@pytest.mark.parametrize(
    ("dtype", "number"),
    [(dtype, number) for dtype in (torch.float64, torch.float32, torch.bfloat16) for number in HIDING]
    + [(torch.float16, "least float16"), (torch.float16, "-1e4")],
    ids=str,
)
@pytest.mark.parametrize("q_len", [1, 21])
def test_rows_hidden_everywhere_follow_the_rule_of_tolerance(q_len, number, dtype):
    mask = hiding_mask(HIDING[number])[:q_len]
    check(make_call(**SHAPE | {"q_len": q_len, "k_len": 30}, dtype=dtype, attn_mask=mask))


def test_probabilities_of_a_hidden_row_add_up_to_one():
    """Probabilities of a row add up to one exactly if its dvalue, summed over the keys, is dout."""
    call = make_call(**SHAPE, with_dlse=False, attn_mask=hiding_mask(torch.finfo(torch.float32).min))
    grads = run(call, needs=("value", "prefix_value")).grads
    summed = grads["value"].sum((0, 2)) + grads["prefix_value"].sum(1)
    expected = call.dout.float().sum((0, 2)).unflatten(0, (2, 2)).sum(1)
    torch.testing.assert_close(summed, expected)
