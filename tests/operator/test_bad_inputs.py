"""Bad input is refused with the argument's name, what was expected and what came; nothing is guessed."""

import math
import re

import pytest
import torch
from helpers import make_call

from prefix_kernels import prefix_attention
from prefix_kernels.reference import prefix_attention_reference

ERRORS = (ValueError, TypeError, IndexError, RuntimeError, NotImplementedError)

f32, f64, bf16, i64 = torch.float32, torch.float64, torch.bfloat16, torch.int64


def zeros(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# Every case changes some arguments of a good call: query [2, 8, 6, 16], key and value [2, 4, 9, 16], prefix [4, 5, 16].
# argument that the message must name; what it must say was expected; what it must say came; the changed arguments.
CASES: dict[str, tuple[str, str, str, dict]] = {
    # ranks
    "query rank 3": ("query", "[B, Hq, Sq, D]", "[8, 6, 16]", {"query": zeros(8, 6, 16)}),
    "query rank 5": ("query", "[B, Hq, Sq, D]", "[1, 2, 8, 6, 16]", {"query": zeros(1, 2, 8, 6, 16)}),
    "key rank 3": ("key", "", "[4, 9, 16]", {"key": zeros(4, 9, 16)}),
    "value rank 2": ("value", "", "[9, 16]", {"value": zeros(9, 16)}),
    "prefix_key rank 2": ("prefix_key", "[4, P, 16]", "[5, 16]", {"prefix_key": zeros(5, 16)}),
    "prefix_key rank 5": ("prefix_key", "[4, P, 16]", "[1, 1, 4, 5, 16]", {"prefix_key": zeros(1, 1, 4, 5, 16)}),
    # shapes
    "key of another batch": ("key", "2", "[3, 4, 9, 16]", {"key": zeros(3, 4, 9, 16)}),
    "key of another head_dim": ("key", "16", "[2, 4, 9, 8]", {"key": zeros(2, 4, 9, 8)}),
    "value of another length": ("value", "[2, 4, 9, Dv]", "[2, 4, 8, 16]", {"value": zeros(2, 4, 8, 16)}),
    "value of other heads": ("value", "[2, 4, 9, Dv]", "[2, 8, 9, 16]", {"value": zeros(2, 8, 9, 16)}),
    "value of another head_dim than prefix_value": (
        "prefix_value",
        "[4, P, 32]",
        "[4, 5, 16]",
        {"value": zeros(2, 4, 9, 32)},
    ),
    "value of head_dim 0": ("value", "from 1 to 256", "[2, 4, 9, 0]", {"value": zeros(2, 4, 9, 0)}),
    "value of head_dim 257": ("value", "from 1 to 256", "[2, 4, 9, 257]", {"value": zeros(2, 4, 9, 257)}),
    "query heads not a multiple": (
        "key",
        "divides query's 8",
        "[2, 3, 9, 16]",
        {"key": zeros(2, 3, 9, 16), "value": zeros(2, 3, 9, 16)},
    ),
    "fewer query heads than key heads": ("key", "divides query's 2", "[2, 4, 9, 16]", {"query": zeros(2, 2, 6, 16)}),
    "no key heads": ("key", "", "0", {"key": zeros(2, 0, 9, 16), "value": zeros(2, 0, 9, 16)}),
    "prefix_key of other heads": (
        "prefix_key",
        "[4, P, 16] or [N, 4, P, 16]",
        "[8, 5, 16]",
        {"prefix_key": zeros(8, 5, 16)},
    ),
    "prefix_key of another head_dim": ("prefix_key", "[4, P, 16]", "[4, 5, 32]", {"prefix_key": zeros(4, 5, 32)}),
    "prefix_value of another head_dim": ("prefix_value", "[4, P, 16]", "[4, 5, 32]", {"prefix_value": zeros(4, 5, 32)}),
    "prefix_value of another length": ("prefix_value", "[4, 5, 16]", "[4, 6, 16]", {"prefix_value": zeros(4, 6, 16)}),
    "prefix_value of another rank": (
        "prefix_value",
        "[4, 5, 16]",
        "[1, 4, 5, 16]",
        {"prefix_value": zeros(1, 4, 5, 16)},
    ),
    "bank without ids of another size": (
        "prefix_key",
        "2",
        "3",
        {"prefix_key": zeros(3, 4, 5, 16), "prefix_value": zeros(3, 4, 5, 16)},
    ),
    "head_dim 0": (
        "query",
        "",
        "0",
        {name: zeros(*shape, 0) for name, shape in {"query": (2, 8, 6), "key": (2, 4, 9), "value": (2, 4, 9)}.items()}
        | {"prefix_key": None, "prefix_value": None},
    ),
    "head_dim 257": (
        "query",
        "256",
        "257",
        {name: zeros(*shape, 257) for name, shape in {"query": (2, 8, 6), "key": (2, 4, 9), "value": (2, 4, 9)}.items()}
        | {"prefix_key": None, "prefix_value": None},
    ),
    # dtypes
    "query of integers": ("query", "float", "(Long|int64)", {"query": zeros(2, 8, 6, 16, dtype=i64)}),
    "query of complex numbers": ("query", "float", "[Cc]omplex", {"query": zeros(2, 8, 6, 16, dtype=torch.complex64)}),
    "query of bools": ("query", "float", "[Bb]ool", {"query": zeros(2, 8, 6, 16, dtype=torch.bool)}),
    "key of another dtype": ("key", "[Ff]loat", "(BFloat16|bfloat16)", {"key": zeros(2, 4, 9, 16, dtype=bf16)}),
    "value of another dtype": ("value", "[Ff]loat", "(Double|float64)", {"value": zeros(2, 4, 9, 16, dtype=f64)}),
    "prefix_key of integers": (
        "prefix_key",
        "float",
        "(Int|int32)",
        {"prefix_key": zeros(4, 5, 16, dtype=torch.int32)},
    ),
    "prefix_value of another dtype than prefix_key": (
        "prefix_value",
        "[Ff]loat",
        "(BFloat16|bfloat16)",
        {"prefix_value": zeros(4, 5, 16, dtype=bf16)},
    ),
    # devices, layouts and strides
    "key on another device": ("key", "cpu", "meta", {"key": torch.zeros(2, 4, 9, 16, device="meta")}),
    "prefix_key on another device": ("prefix_key", "cpu", "meta", {"prefix_key": torch.zeros(4, 5, 16, device="meta")}),
    "mask on another device": ("attn_mask", "cpu", "meta", {"attn_mask": torch.zeros(9, device="meta")}),
    "query with strided columns": ("query", "stride", "2", {"query": zeros(2, 8, 6, 32)[..., ::2]}),
    "key with strided columns": ("key", "stride", "9", {"key": zeros(2, 4, 16, 9).transpose(-1, -2)}),
    "prefix_key with strided columns": ("prefix_key", "stride", "5", {"prefix_key": zeros(4, 16, 5).transpose(-1, -2)}),
    # a prefix and what belongs to it
    "prefix_key alone": ("prefix_value", "prefix_key", "None", {"prefix_value": None}),
    "prefix_value alone": ("prefix_key", "prefix_value", "None", {"prefix_key": None}),
    "ids without a prefix": (
        "prefix_ids",
        "None without prefix_key",
        "[2]",
        {"prefix_key": None, "prefix_value": None, "prefix_ids": zeros(2, dtype=i64)},
    ),
    "lens without a prefix": (
        "prefix_lens",
        "None without prefix_key",
        "[1]",
        {"prefix_key": None, "prefix_value": None, "prefix_lens": zeros(1, dtype=i64)},
    ),
    "ids of another batch": ("prefix_ids", "2", "[3]", {"prefix_ids": zeros(3, dtype=i64)}),
    "ids of rank 3": ("prefix_ids", "[2] or [2, M]", "[2, 1, 1]", {"prefix_ids": zeros(2, 1, 1, dtype=i64)}),
    "ids of floats": ("prefix_ids", "int", "[Ff]loat", {"prefix_ids": zeros(2)}),
    "id too large for one prefix": ("prefix_ids", "1", "1", {"prefix_ids": torch.tensor([0, 1])}),
    "id too large": ("prefix_ids", "3", "3", {"bank": 3, "prefix_ids": torch.tensor([0, 3])}),
    "id too small": ("prefix_ids", "-1", "-2", {"bank": 3, "prefix_ids": torch.tensor([-2, 0])}),
    "id too large in a second slot": (
        "prefix_ids",
        "3",
        "7",
        {"bank": 3, "prefix_ids": torch.tensor([[0, 1], [2, 7]])},
    ),
    "lens of another number": ("prefix_lens", "3", "[2]", {"bank": 3, "prefix_lens": zeros(2, dtype=i64), "ids": True}),
    "lens of rank 2": ("prefix_lens", "3", "[3, 1]", {"bank": 3, "prefix_lens": zeros(3, 1, dtype=i64), "ids": True}),
    "lens of floats": ("prefix_lens", "int", "[Ff]loat", {"bank": 3, "prefix_lens": zeros(3), "ids": True}),
    "length too large": ("prefix_lens", "5", "6", {"bank": 3, "prefix_lens": torch.tensor([5, 6, 0]), "ids": True}),
    "length below zero": ("prefix_lens", "0", "-1", {"bank": 3, "prefix_lens": torch.tensor([5, -1, 0]), "ids": True}),
    # masks
    "mask of other columns": ("attn_mask", "9", "[7]", {"attn_mask": zeros(7)}),
    "mask over the prefix alone": ("attn_mask", "14", "[6, 5]", {"attn_mask": zeros(6, 5)}),
    "mask of other rows": ("attn_mask", "6", "[5, 9]", {"attn_mask": zeros(5, 9)}),
    "mask of other heads": ("attn_mask", "8", "[1, 4, 6, 9]", {"attn_mask": zeros(1, 4, 6, 9)}),
    "mask of another batch": ("attn_mask", "2", "[3, 1, 1, 9]", {"attn_mask": zeros(3, 1, 1, 9)}),
    "mask of rank 5": ("attn_mask", "", "[1, 1, 1, 1, 9]", {"attn_mask": zeros(1, 1, 1, 1, 9)}),
    "mask of integers": ("attn_mask", "bool", "(Long|int64)", {"attn_mask": zeros(9, dtype=i64)}),
    "mask that asks for a gradient": ("attn_mask", "gradient", "", {"attn_mask": zeros(9).requires_grad_()}),
    # numbers
    "dropout below zero": ("dropout_p", "from 0 to 1", "-0.1", {"dropout_p": -0.1}),
    "dropout above one": ("dropout_p", "from 0 to 1", "1.5", {"dropout_p": 1.5}),
    "dropout that is not a number": ("dropout_p", "from 0 to 1", "nan", {"dropout_p": math.nan}),
    "softcap below zero": ("softcap", "0", "-1", {"softcap": -1.0}),
    "softcap that is not a number": ("softcap", "", "nan", {"softcap": math.nan}),
    "infinite softcap": ("softcap", "1e30", "inf", {"softcap": math.inf}),
    "softcap beyond float32": ("softcap", "1e30", "1e+39", {"softcap": 1e39}),
    "softcap whose inverse is beyond float32": ("softcap", "1e-30", "1e-40", {"softcap": 1e-40}),
    "softcap that is None": ("softcap", "number", "None", {"softcap": None}),
    "dropout that is None": ("dropout_p", "number", "None", {"dropout_p": None}),
    "scale that is a string": ("scale", "number", "'x'", {"scale": "x"}),
    "window of a string": ("window_size", "integer", "'a'", {"window_size": ("a", 1)}),
    "scale that is not a number": ("scale", "finite", "nan", {"scale": math.nan}),
    "infinite scale": ("scale", "finite", "inf", {"scale": math.inf}),
    "window below minus one": ("window_size", "-1", "-2", {"window_size": (-2, 3)}),
    "window below minus one on the right": ("window_size", "-1", "-5", {"window_size": (3, -5)}),
    "window of one number": ("window_size", "", "3", {"window_size": (3,)}),
    "window that is a number": ("window_size", "", "3", {"window_size": 3}),
    "offsets of another batch": (
        "query_offset",
        "[2]",
        "[3]",
        {"query_offset": zeros(3, dtype=i64), "is_causal": True},
    ),
    "offsets of rank 2": ("query_offset", "[2]", "[2, 1]", {"query_offset": zeros(2, 1, dtype=i64), "is_causal": True}),
    "offsets of floats": ("query_offset", "int", "[Ff]loat", {"query_offset": zeros(2), "is_causal": True}),
    "offset that is a float": ("query_offset", "int", "float", {"query_offset": 1.5, "is_causal": True}),
    "seed of two numbers": (
        "dropout_seed",
        "one number",
        "[2]",
        {"dropout_seed": zeros(2, dtype=i64), "dropout_p": 0.1},
    ),
    "seed of floats": ("dropout_seed", "int64", "[Ff]loat", {"dropout_seed": zeros(1), "dropout_p": 0.1}),
    "seed that is a number": ("dropout_seed", "Tensor", "int", {"dropout_seed": 3, "dropout_p": 0.1}),
    # not tensors, or not dense ones
    "query that is None": ("query", "Tensor", "None", {"query": None}),
    "key that is None": ("key", "Tensor", "None", {"key": None}),
    "ids that are a list": ("prefix_ids", "Tensor", "list", {"bank": 3, "prefix_ids": [0, 1]}),
    "sparse query": ("query", "dense", "sparse_coo", {"query": zeros(2, 8, 6, 16).to_sparse()}),
    "sparse mask": ("attn_mask", "dense", "sparse_coo", {"attn_mask": zeros(9).to_sparse()}),
    "key of another library's layout": ("key", "dense", "mkldnn", {"key": zeros(2, 4, 9, 16).to_mkldnn()}),
    "nested query": ("query", "dense", "nested", {"query": torch.nested.nested_tensor([zeros(8, 6, 16)] * 2)}),
    "jagged key": (
        "key",
        "dense",
        "nested",
        {"key": torch.nested.nested_tensor([zeros(4, 9, 16)] * 2, layout=torch.jagged)},
    ),
    "quantised value": (
        "value",
        "float",
        "qint8",
        {"value": torch.quantize_per_tensor(zeros(2, 4, 9, 16), 0.1, 0, torch.qint8)},
    ),
    "query that is a list": ("query", "Tensor", "list", {"query": [[[[1.0]]]]}),
    "prefix_key that is a number": ("prefix_key", "Tensor", "int", {"prefix_key": 3}),
    "mask that is a string": ("attn_mask", "Tensor", "str", {"attn_mask": "causal"}),
}


def arguments(changes: dict) -> dict:
    """A good call with the changes; ``bank`` makes the prefix a bank of so many and ``ids`` names valid ids."""
    changes = dict(changes)
    bank, with_ids = changes.pop("bank", None), changes.pop("ids", False)
    call = make_call(q_heads=8, kv_heads=4, q_len=6, k_len=9, num_prefixes=bank, layout="contiguous")
    if with_ids:
        changes["prefix_ids"] = torch.tensor([0, 2])
    return {**call.inputs, **changes}


def test_the_call_that_every_case_changes_is_good():
    prefix_attention(**arguments({}))
    prefix_attention(**arguments({"bank": 3, "ids": True}))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_by_name_with_expected_and_got(name):
    argument, expected, got, changes = CASES[name]
    with pytest.raises(ERRORS) as raised:
        prefix_attention(**arguments(changes))
    message = str(raised.value).splitlines()[0]
    assert message.startswith(f"{argument}: expected"), message
    assert has(expected, message), f"expected {expected!r} to be named in: {message}"
    assert has(got, re.split("got |found ", message)[-1]), f"got {got!r} to be named in: {message}"


def has(fragment: str, message: str) -> bool:
    """Fragments with a choice in round brackets or of two letters in square ones are patterns, the rest is literal."""
    is_pattern = "|" in fragment or re.match(r"\[[A-Za-z]{2}\]", fragment)
    return re.search(fragment if is_pattern else re.escape(fragment), message) is not None


@pytest.mark.parametrize(
    "changes", [{"query": zeros(2, 8, 6, 16, dtype=i64)}, {"key": zeros(2, 4, 9, 16, dtype=bf16)}], ids=str
)
def test_a_wrong_dtype_is_a_type_error(changes):
    with pytest.raises(TypeError):
        prefix_attention(**arguments(changes))


@pytest.mark.parametrize("changes", [{"key": zeros(4, 9, 16)}, {"softcap": -1.0}, {"attn_mask": zeros(7)}], ids=str)
def test_a_wrong_shape_or_number_is_a_value_error(changes):
    with pytest.raises(ValueError):
        prefix_attention(**arguments(changes))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("prefix_key", {"prefix_key": None}),
        ("prefix_value", {"prefix_value": None}),
        ("dropout_seed", {"dropout_p": 0.5, "dropout_seed": None}),
    ],
    ids=["no prefix_key", "no prefix_value", "no dropout_seed"],
)
def test_the_reference_names_what_is_missing(argument, changes):
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got None"):
        prefix_attention_reference(**arguments(changes))


def backward_arguments() -> dict[str, object]:
    """Arguments of the raw backward operator, by the names of its schema, for all five gradients."""
    call = make_call(q_heads=4, kv_heads=2, q_len=6, k_len=9, layout="contiguous")
    out, lse = prefix_attention(*call.inputs.values(), return_lse=True)
    names = [argument.name for argument in torch.ops.prefix_kernels.backward.default._schema.arguments]
    options = {"dropout_p": 0.0, "is_causal": False, "window_left": -1, "window_right": -1, "softcap": 0.0}
    given = {
        **call.inputs,
        **options,
        "dout": call.dout.to(f32),
        "out": out,
        "lse": lse,
        "window_includes_prefix": False,
    }
    return dict.fromkeys(names) | given | {"key_len": 9, "needs": [True] * 5}


def test_the_backward_call_that_every_case_changes_is_good():
    assert all(x.isfinite().all() for x in torch.ops.prefix_kernels.backward(*backward_arguments().values()))


@pytest.mark.parametrize(
    ("argument", "changes"),
    {
        "key of another batch": ("key", {"key": zeros(5, 2, 9, 16)}),
        "key with strided columns": ("key", {"key": zeros(2, 2, 16, 9).mT}),
        "value of another length": ("value", {"value": zeros(2, 2, 8, 16)}),
        "value that is missing": ("value", {"value": None}),
        "prefix_key of other heads": ("prefix_key", {"prefix_key": zeros(4, 5, 16)}),
        "prefix_value with strided columns": ("prefix_value", {"prefix_value": zeros(2, 16, 5).mT}),
        "prefix_value that is missing": ("prefix_value", {"prefix_value": None}),
        "prefix that is missing": ("prefix_key", {"prefix_key": None, "prefix_value": None}),
        "bank of another size without ids": (
            "prefix_key",
            {"prefix_key": zeros(3, 2, 5, 16), "prefix_value": zeros(3, 2, 5, 16)},
        ),
        "prefix without heads": (
            "prefix_key",
            {"key": None, "value": None, "prefix_key": zeros(0, 5, 16), "prefix_value": zeros(0, 5, 16)}
            | {"needs": [False, False, False, True, True]},
        ),
        "value without heads": ("value", {"key": None, "value": zeros(2, 0, 9, 16)}),
        "ids of another batch": ("prefix_ids", {"prefix_ids": zeros(5, dtype=i64)}),
        "lens of another number": ("prefix_lens", {"prefix_lens": zeros(5, dtype=i64)}),
        "offsets of another batch": ("query_offset", {"query_offsets": zeros(5, dtype=i64)}),
        "mask of other columns": ("attn_mask", {"attn_mask": zeros(3)}),
        "value of another head_dim": ("dout", {"value": zeros(2, 2, 9, 8)}),
        "dout of another head_dim": ("dout", {"dout": zeros(2, 4, 6, 8)}),
        "dout of another head_dim than prefix_value": (
            "dout",
            {"value": None, "dout": zeros(2, 4, 6, 8), "needs": [False, False, True, True, True]},
        ),
        "dout of head_dim 257": (
            "dout",
            {
                "value": None,
                "prefix_value": None,
                "dout": zeros(2, 4, 6, 257),
                "needs": [False, False, True, False, True],
            },
        ),
        "out of another head_dim": ("out", {"out": zeros(2, 4, 6, 8)}),
        "dout of another shape": ("dout", {"dout": zeros(2, 4, 5, 16)}),
        "dout of another dtype": ("dout", {"dout": zeros(2, 4, 6, 16, dtype=f64)}),
        "out of another shape": ("out", {"out": zeros(2, 4, 5, 16)}),
        "out of another dtype": ("out", {"out": zeros(2, 4, 6, 16, dtype=f64)}),
        "out that is missing": ("out", {"out": None}),
        "lse of another shape": ("lse", {"lse": zeros(2, 4, 5)}),
        "dlse of another shape": ("dlse", {"dlse": zeros(2, 4, 5)}),
        "key_len of another key": ("key_len", {"key_len": 8}),
    }.values(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_backward_operator_checks_what_it_is_given(argument, changes):
    assert changes.keys() <= backward_arguments().keys()
    with pytest.raises(ERRORS, match=f"^{argument}: expected"):
        torch.ops.prefix_kernels.backward(*(backward_arguments() | changes).values())
