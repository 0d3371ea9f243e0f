"""Properties of the operator on inputs that hypothesis draws from the whole grid of options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import INPUT_NAMES, LAYOUTS, Call, check, make_call, run
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 145, 160, 161, 200]))
HEAD_DIMS = st.one_of(st.sampled_from([8, 16, 32, 64, 128]), st.integers(1, 96))
WINDOWS = st.one_of(st.just(-1), st.integers(0, 20), st.integers(0, 200))


@st.composite
def masks(draw: st.DrawFn, batch: int, heads: int, q_len: int, columns: list[int]) -> torch.Tensor | None:
    if not draw(st.booleans()):
        return None
    full = (batch, heads, q_len, draw(st.sampled_from(columns)))
    shape = [draw(st.sampled_from([1, size])) for size in full[:3]] + [full[3]]
    shape = shape[draw(st.integers(0, 3)) :]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    seen = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]))
    if draw(st.booleans()):
        return seen
    added = torch.randn(shape, generator=generator).masked_fill(~seen, -torch.inf)
    return added.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any legal call of small size."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len, k_len = draw(LENGTHS), draw(LENGTHS)
    prefix_len = draw(st.one_of(st.none(), LENGTHS))
    options: dict[str, Any] = {}
    num_prefixes = None
    slots = 0 if prefix_len is None else 1
    if prefix_len is not None:
        kind = draw(st.sampled_from(["one", "rows", "ids", "slots"]))
        if kind == "rows":
            num_prefixes = batch
        elif kind != "one":
            num_prefixes = draw(st.integers(1, 4))
            slots = draw(st.integers(1, 3)) if kind == "slots" else 1
            ids = [[draw(st.integers(-1, num_prefixes - 1)) for _ in range(slots)] for _ in range(batch)]
            ids = torch.tensor(ids, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
            options["prefix_ids"] = ids[:, 0] if kind == "ids" else ids
        if draw(st.booleans()):
            lens = [draw(st.integers(0, prefix_len)) for _ in range(num_prefixes or 1)]
            options["prefix_lens"] = torch.tensor(lens)
    columns = [k_len] if slots == 0 else [k_len, slots * prefix_len + k_len]
    # With one key, or with none, a mask of so many columns would be another mask: see test_attention_mask.py.
    columns = [each for each in columns if each > 1] or [1]
    options["attn_mask"] = draw(masks(batch, kv_heads * group, q_len, columns))
    options["is_causal"] = draw(st.booleans())
    options["window_size"] = (draw(WINDOWS), draw(WINDOWS))
    options["window_includes_prefix"] = draw(st.booleans())
    offset = draw(st.sampled_from(["default", "int", "tensor"]))
    if offset == "int":
        options["query_offset"] = draw(st.integers(-50, 250))
    elif offset == "tensor":
        options["query_offset"] = torch.tensor([draw(st.integers(-50, 250)) for _ in range(batch)])
    options["softcap"] = draw(st.sampled_from([0.0, 0.0, 2.0, 30.0]))
    options["scale"] = draw(st.sampled_from([None, None, 0.02, 0.15]))
    if draw(st.booleans()):
        options["dropout_p"] = draw(st.sampled_from([0.1, 0.5]))
        options["dropout_seed"] = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))])
    return make_call(
        batch=batch,
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        k_len=k_len,
        prefix_len=prefix_len,
        num_prefixes=num_prefixes,
        head_dim=draw(HEAD_DIMS),
        value_dim=draw(st.one_of(st.none(), HEAD_DIMS)),
        dtype=draw(st.sampled_from(DTYPES)),
        prefix_dtype=draw(st.sampled_from([None, None, *DTYPES])),
        layout=draw(st.sampled_from(LAYOUTS)),
        with_dlse=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        **options,
    )


@given(call=calls(), needs=st.sets(st.sampled_from(INPUT_NAMES)))
def test_every_legal_call_matches_the_oracle_in_results_and_asked_for_gradients(call, needs):
    check(call, needs=[name for name in call.names if name in needs])


def double(call: Call) -> Call:
    """The same call in float64 throughout, so that two ways to the same number can be compared tightly."""
    inputs = {name: None if tensor is None else tensor.double() for name, tensor in call.inputs.items()}
    return Call(inputs, dict(call.options), call.dout, call.dlse)


@settings(max_examples=settings().max_examples // 6)
@given(call=calls())
def test_the_output_is_linear_in_the_values(call):
    call = double(call)
    once = run(call, needs=())
    for name in ("value", "prefix_value"):
        if call.inputs[name] is not None:
            call.inputs[name] = -3 * call.inputs[name]
    torch.testing.assert_close(run(call, needs=()).out, -3 * once.out)


@settings(max_examples=settings().max_examples // 6)
@given(call=calls())
def test_the_gradients_to_the_values_and_the_output_tell_the_same_sum(call):
    """sum(dout * out) = sum(dvalue * value), whatever is masked or dropped."""
    call = double(call)
    result = run(call)
    values = sum(
        (result.grads[name] * call.inputs[name].nan_to_num()).sum()
        for name in ("value", "prefix_value")
        if call.inputs[name] is not None
    )
    torch.testing.assert_close(values, (result.out * call.dout).sum())


@settings(max_examples=settings().max_examples // 6)
@given(call=calls(), shift=st.integers(1, 5))
def test_rolling_the_batch_rolls_the_results_and_not_the_prefix_gradients(call, shift):
    call = double(call)
    call.options.pop("dropout_p", None)  # whose bits belong to the batch row
    if (
        call.inputs["prefix_key"] is not None
        and call.inputs["prefix_key"].dim() == 4
        and "prefix_ids" not in call.options
    ):
        call.options["prefix_ids"] = torch.arange(call.inputs["query"].shape[0])
    before = run(call)

    def roll(tensor):
        return tensor.roll(shift, 0)

    batch = call.inputs["query"].shape[0]
    rolled = Call(
        {
            name: tensor if tensor is None or name.startswith("prefix") else roll(tensor)
            for name, tensor in call.inputs.items()
        },
        dict(call.options),
        roll(call.dout),
        None if call.dlse is None else roll(call.dlse),
    )
    for name in ("prefix_ids", "query_offset"):
        if isinstance(rolled.options.get(name), torch.Tensor):
            rolled.options[name] = roll(rolled.options[name])
    mask = rolled.options["attn_mask"]
    if mask is not None and mask.dim() == 4 and mask.shape[0] == batch:
        rolled.options["attn_mask"] = roll(mask)
    after = run(rolled)
    torch.testing.assert_close(after.out, roll(before.out))
    for name in call.names:
        expected = before.grads[name]
        torch.testing.assert_close(after.grads[name], expected if name.startswith("prefix") else roll(expected))
