"""Packed sequences: each gets what it gets alone, and so do the gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import lay_out, nan_filled
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from prefix_kernels import prefix_attention, prefix_attention_varlen
from prefix_kernels.reference import prefix_attention_reference

Q_LENS, K_LENS = [5, 0, 70, 1, 9, 4], [7, 3, 70, 1, 0, 140]
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


def starts(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def packed(lengths: list[int], heads: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), heads, dim, generator=generator, dtype=torch.float64)


def inputs(q_lens: list[int] = Q_LENS, k_lens: list[int] = K_LENS) -> dict[str, Tensor]:
    return {
        "query": packed(q_lens, HEADS, DIM, 0),
        "key": packed(k_lens, KV_HEADS, DIM, 1),
        "value": packed(k_lens, KV_HEADS, VALUE_DIM, 2),
    }


def bank(kind: str) -> dict[str, Tensor]:
    """Prefixes of a kind, and the arguments that name them."""
    if kind == "none":
        return {}
    generator = torch.Generator().manual_seed(3)

    def made(*shape: int) -> dict[str, Tensor]:
        dims = {"prefix_key": DIM, "prefix_value": VALUE_DIM}
        return {name: torch.randn(*shape, dim, generator=generator, dtype=torch.float64) for name, dim in dims.items()}

    ids = torch.tensor([[1, -1], [0, 2], [2, 2], [-1, -1], [0, 1], [-1, 2]])
    if kind == "one for all":
        return made(KV_HEADS, 5)
    if kind == "one for each":
        return made(len(Q_LENS), KV_HEADS, 5)
    if kind == "named":
        return made(3, KV_HEADS, 5) | {"prefix_ids": ids, "prefix_lens": torch.tensor([5, 0, 3])}
    lengths = [4, 0, 150]
    return made(sum(lengths), KV_HEADS) | {"prefix_ids": ids.int(), "cu_prefix_lens": starts(lengths)}


def prefix_of(arguments: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The prefix ``[Hkv, P, D]`` of sequence ``n``, all of its slots one after another."""
    key, value = arguments.get("prefix_key"), arguments.get("prefix_value")
    if key is None:
        return None, None
    if "cu_prefix_lens" in arguments:
        sizes = arguments["cu_prefix_lens"].diff().tolist()
        banks = [list(x.transpose(0, 1).split(sizes, 1)) for x in (key, value)]
    elif key.dim() == 3:
        banks = [[key], [value]]
    else:
        lens = arguments.get("prefix_lens", torch.full((key.shape[0],), key.shape[2]))
        banks = [[x[i, :, : lens[i]] for i in range(x.shape[0])] for x in (key, value)]
    ids = arguments.get("prefix_ids")
    slots = [n if len(banks[0]) > 1 else 0] if ids is None else ids.reshape(ids.shape[0], -1)[n].tolist()
    chosen = [[x[i] for i in slots if i >= 0] for x in banks]
    if not chosen[0]:
        return None, None
    return tuple(torch.cat(parts, dim=1) for parts in chosen)


def one_by_one(arguments: dict[str, Tensor], q_lens: list[int], k_lens: list[int], **options: object) -> list[Tensor]:
    """The results of each sequence alone, packed: the oracle."""
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    q_starts, k_starts = starts(q_lens), starts(k_lens)
    offsets = options.pop("query_offset", None)
    outs, lses = [], []
    for n in range(len(q_lens)):
        q = query[q_starts[n] : q_starts[n + 1]].transpose(0, 1)[None]
        k, v = (x[k_starts[n] : k_starts[n + 1]].transpose(0, 1)[None] for x in (key, value))
        offset = k_lens[n] - q_lens[n] if offsets is None else int(offsets[n])
        out, lse = prefix_attention_reference(
            q, k, v, *prefix_of(arguments, n), query_offset=offset, return_lse=True, **options
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return [torch.cat(outs), torch.cat(lses, dim=1)]


def gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in results]
    # A row that sees nothing has an lse without a gradient.
    loss = sum((torch.where(x.isinf(), 0, x) * weight).sum() for x, weight in zip(results, weights, strict=True))
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (6, 2)},
    "window over the prefix": {"is_causal": True, "window_size": (6, 0), "window_includes_prefix": True},
    "softcap and scale": {"softcap": 1.5, "scale": 0.7},
    "offsets": {"is_causal": True, "query_offset": torch.tensor([3, 0, -20, 5, 0, 100])},
}


@pytest.mark.parametrize("kind", ["none", "one for all", "one for each", "named", "packed"])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_sequence_gets_what_it_gets_alone(option: str, kind: str) -> None:
    arguments = inputs() | bank(kind)
    leaves = [arguments[name].requires_grad_() for name in NAMES if name in arguments]
    lengths = {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS, torch.int64)}
    actual = list(prefix_attention_varlen(**arguments, **lengths, return_lse=True, **OPTIONS[option]))
    expected = one_by_one(arguments, Q_LENS, K_LENS, **OPTIONS[option])
    assert actual[0].shape == (sum(Q_LENS), HEADS, VALUE_DIM) and actual[1].shape == (HEADS, sum(Q_LENS))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("needs", [("query",), ("prefix_key",), ("prefix_value",), ("key", "prefix_key"), NAMES[3:]])
@pytest.mark.parametrize("kind", ["named", "packed"])
def test_every_set_of_gradients(kind: str, needs: tuple[str, ...]) -> None:
    arguments = inputs() | bank(kind)
    leaves = [arguments[name].requires_grad_() for name in needs]
    lengths = {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS)}
    out = prefix_attention_varlen(**arguments, **lengths, is_causal=True)
    expected, _ = one_by_one(arguments, Q_LENS, K_LENS, is_causal=True)
    for got, want in zip(gradients([out], leaves), gradients([expected], leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_a_live_prefix_is_attention_of_a_tree() -> None:
    # A prompt, two turns after it, and a turn after the first of them.
    lengths, ancestors = [40, 9, 150, 6], [[], [0], [0], [0, 1]]
    ids = torch.tensor([[-1, -1], [0, -1], [0, -1], [0, 1]])
    x = inputs(lengths, lengths)
    leaves = [x[name].requires_grad_() for name in NAMES[:3]]
    cu = starts(lengths)
    out = prefix_attention_varlen(*leaves, x["key"], x["value"], cu, prefix_ids=ids, cu_prefix_lens=cu, is_causal=True)
    rows = []
    for n, path in enumerate(ancestors):
        seen = torch.cat([torch.arange(cu[i], cu[i + 1]) for i in (*path, n)])
        own = slice(cu[n], cu[n + 1])
        q, k, v = (x[name][index].transpose(0, 1)[None] for name, index in zip(NAMES, (own, seen, seen), strict=False))
        rows.append(prefix_attention_reference(q, k, v, is_causal=True)[0].transpose(0, 1))
    expected = torch.cat(rows)
    torch.testing.assert_close(out, expected)
    for got, want in zip(gradients([out], leaves), gradients([expected], leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_and_many_short_sequences(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lengths = [int(n) for n in torch.randint(0, 6, (90,), generator=torch.Generator().manual_seed(1))] + [300]
        x = inputs(lengths, lengths) | bank("one for all")
        leaves = [x[name].requires_grad_() for name in NAMES]
        out = prefix_attention_varlen(*leaves, starts(lengths), is_causal=True)
        expected, _ = one_by_one(x, lengths, lengths, is_causal=True)
        torch.testing.assert_close(out, expected)
        for got, want in zip(gradients([out], leaves), gradients([expected], leaves), strict=True):
            torch.testing.assert_close(got, want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("query_len", [1, 33])
def test_every_dtype(dtype: torch.dtype, query_len: int) -> None:
    q_lens, k_lens = [query_len] * 3, [50, 200, 7]
    x = {name: tensor.to(dtype) for name, tensor in (inputs(q_lens, k_lens) | bank("one for all")).items()}
    leaves = [x[name].requires_grad_() for name in NAMES]
    cu = starts(q_lens), starts(k_lens)
    out, lse = prefix_attention_varlen(*leaves, *cu, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    expected = one_by_one(wide, q_lens, k_lens)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-4, atol=1e-4)
    for got, want in zip(gradients([out], leaves), gradients(expected[:1], list(wide.values())), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_dropout_drops_what_a_batch_of_equal_lengths_drops() -> None:
    lengths, seed = [40, 40, 40], torch.tensor([5])
    x = inputs(lengths, lengths)
    dense = [tensor.unflatten(0, (3, 40)).transpose(1, 2) for tensor in x.values()]
    expected = prefix_attention(*dense, dropout_p=0.3, dropout_seed=seed).transpose(1, 2).flatten(0, 1)
    out = prefix_attention_varlen(*x.values(), cu_seqlens_q=starts(lengths), dropout_p=0.3, dropout_seed=seed)
    torch.testing.assert_close(out, expected)


def test_gradcheck() -> None:
    q_lens, k_lens = [3, 0, 2], [4, 2, 1]
    x = inputs(q_lens, k_lens) | bank("one for all")
    leaves = [x[name].requires_grad_() for name in NAMES]
    cu = starts(q_lens), starts(k_lens)
    assert torch.autograd.gradcheck(
        lambda *tensors: prefix_attention_varlen(*tensors, *cu, is_causal=True, return_lse=True), leaves
    )


def test_opcheck() -> None:
    x = inputs() | bank("packed")
    arguments = (
        *(x["query"], x["key"], x["value"], x["prefix_key"], x["prefix_value"], starts(Q_LENS), starts(K_LENS)),
        *(x["cu_prefix_lens"], x["prefix_ids"], None, None, None, -1, -1, 0.0, True, None, -1, -1, False, 0.0),
    )
    arguments = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    torch.library.opcheck(torch.ops.prefix_kernels.packed_forward.default, arguments)


def test_compiled_code_serves_other_lengths_without_compiling_again() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prefix_attention_varlen, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for lengths in ([4, 9, 3], [8, 2, 30], [7, 7, 1]):
        x = inputs(lengths, lengths)
        leaves = [tensor.requires_grad_() for tensor in x.values()]
        out = compiled(*leaves, cu_seqlens_q=starts(lengths), is_causal=True)
        expected, _ = one_by_one(x, lengths, lengths, is_causal=True)
        torch.testing.assert_close(out, expected)
        for got, want in zip(gradients([out], leaves), gradients([expected], leaves), strict=True):
            torch.testing.assert_close(got, want)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_at_all(lengths: list[int]) -> None:
    x = inputs(lengths, lengths) | bank("one for all")
    leaves = [x[name].requires_grad_() for name in NAMES]
    out = prefix_attention_varlen(*leaves, starts(lengths))
    assert out.shape == (0, HEADS, VALUE_DIM)
    assert all(grad.count_nonzero() == 0 for grad in gradients([out], leaves))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"cu_seqlens_q": None}, ValueError, r"cu_seqlens_q: expected int32 or int64 \[N \+ 1\], .*got None"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, ValueError, r"cu_seqlens_k: expected \[2\], got \[7\]"),
        ({"cu_seqlens_q": starts(Q_LENS).float()}, TypeError, "cu_seqlens_q: expected int32 or int64, got Float"),
        ({"cu_seqlens_q": starts([9, 0, 70, 1, 9, 4])}, IndexError, "cu_seqlens_q: expected numbers from 0 to 89"),
        ({"cu_seqlens_q": torch.tensor([0, 5, 3, 75, 76, 85, 89])}, IndexError, "do not fall, got 5 and 3 at 1"),
        ({"cu_seqlens_k": starts(K_LENS) + 1}, IndexError, "cu_seqlens_k: expected numbers from 0 to 221.*got 1 to"),
        ({"max_seqlen_q": 60}, ValueError, "max_seqlen_q: expected at least 70, .*got 60"),
        ({"max_seqlen_k": 1.5}, TypeError, "max_seqlen_k: expected an integer, got 1.5"),
        ({"query": torch.zeros(89, 3, DIM, dtype=torch.float64)}, ValueError, "key: expected a number of heads that"),
        ({"query": torch.zeros(1, 89, HEADS, DIM)}, ValueError, r"query: expected \[rows, heads, head dim\]"),
        ({"key": torch.zeros(221, KV_HEADS, 4, dtype=torch.float64)}, ValueError, r"key: expected \[rows, 2, 8\]"),
        ({"value": torch.zeros(4, KV_HEADS, 6, dtype=torch.float64)}, ValueError, "value: expected 221 rows like key"),
        ({"key": torch.zeros(221, KV_HEADS, DIM)}, TypeError, "key: expected Double like query, got Float"),
        ({"prefix_value": None}, ValueError, "prefix_value: expected a tensor like prefix_key, got None"),
        ({"prefix_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"prefix_ids: expected \[6\] or \[6, M\]"),
        ({"prefix_ids": torch.full((6,), 3)}, IndexError, "prefix_ids: expected values from -1 to 2, got 3"),
        ({"prefix_lens": torch.ones(3).long()}, ValueError, "prefix_lens: expected None with cu_prefix_lens"),
        ({"cu_prefix_lens": torch.tensor([0, 4])}, IndexError, "cu_prefix_lens: expected numbers from 0 to 154"),
        ({"prefix_ids": None}, ValueError, "cu_prefix_lens: expected one prefix for each of 6 sequences.*got 3"),
        ({"query_offset": torch.zeros(2).long()}, ValueError, r"query_offset: expected \[6\], got \[2\]"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p: expected a probability from 0 to 1, got 2"),
        ({"window_size": 3}, ValueError, r"window_size: expected \(left, right\), got 3"),
        ({"query": "no"}, TypeError, "query: expected a torch.Tensor, got str"),
    ],
)
def test_bad_input_is_named(changed: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = inputs() | bank("packed") | {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS)}
    with pytest.raises(error, match=message):
        prefix_attention_varlen(**arguments | changed)


def test_double_backward_is_refused() -> None:
    x = inputs()
    query = x["query"].requires_grad_()
    out = prefix_attention_varlen(query, x["key"], x["value"], cu_seqlens_q=starts(Q_LENS), cu_seqlens_k=starts(K_LENS))
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="prefix_attention_varlen: double backward"):
        torch.autograd.grad(grad.sum(), query)


def test_autocast_casts_the_sequences_and_not_the_prefix() -> None:
    x = {name: tensor.float() for name, tensor in (inputs() | bank("one for all")).items()}
    leaves = [x[name].requires_grad_() for name in NAMES]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prefix_attention_varlen(*leaves, starts(Q_LENS), starts(K_LENS))
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in gradients([out], leaves))


def test_memory_around_the_sequences_is_neither_read_nor_kept() -> None:
    """Results that are allocated full of NaN, from slices of tensors that are NaN everywhere else."""
    arguments = inputs() | bank("packed")
    kept = {name: x for name, x in arguments.items() if name not in NAMES}
    options = {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS), "return_lse": True}
    results = []
    for layout in ("contiguous", "poisoned"):
        # Rows are dimension 0 here, heads dimension 1.
        leaves = [lay_out(arguments[name].transpose(0, 1), layout).transpose(0, 1).requires_grad_() for name in NAMES]
        with nan_filled():
            out, lse = prefix_attention_varlen(*leaves, **kept, **options, is_causal=True)
            seen = lse.isfinite()
            grads = torch.autograd.grad(out.sum() + lse[seen].sum(), leaves)
        results.append([out, lse, *grads])
    for plain, poisoned in zip(*results, strict=True):
        assert not poisoned.isnan().any()
        torch.testing.assert_close(poisoned, plain, rtol=0, atol=0)


def test_flops_are_those_of_the_sequences_one_by_one() -> None:
    arguments = inputs() | bank("packed")
    leaves = {name: arguments[name].requires_grad_() for name in NAMES}
    kept = {name: x for name, x in arguments.items() if name not in NAMES}
    starts_of = {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS)}
    with FlopCounterMode(display=False) as counter:
        prefix_attention_varlen(**leaves, **kept, **starts_of).sum().backward()
    expected = 0
    rows = zip(leaves["query"].split(Q_LENS), leaves["key"].split(K_LENS), leaves["value"].split(K_LENS), strict=True)
    for n, row in enumerate(rows):
        alone = [x.detach().transpose(0, 1)[None].requires_grad_() for x in row]
        prefix = [None if x is None else x.detach().requires_grad_() for x in prefix_of(arguments, n)]
        with FlopCounterMode(display=False) as one:
            prefix_attention(*alone, *prefix).sum().backward()
        expected += one.get_total_flops()
    assert counter.get_total_flops() == expected > 0


@pytest.mark.parametrize("kind", ["none", "one for all", "one for each", "named", "packed"])
def test_flops_of_tensors_without_values_are_those_of_the_longest(kind: str) -> None:
    with FakeTensorMode() as mode:
        arguments = {name: mode.from_tensor(x) for name, x in (inputs() | bank(kind)).items()}
        lengths = {"cu_seqlens_q": starts(Q_LENS), "cu_seqlens_k": starts(K_LENS)}
        longest = {"max_seqlen_q": max(Q_LENS), "max_seqlen_k": max(K_LENS)}
        with FlopCounterMode(display=False) as counter:
            prefix_attention_varlen(**arguments, **lengths, **longest)
    prefix = {"none": 0, "one for all": 5, "one for each": 5, "named": 10, "packed": 2 * 154}[kind]
    pairs = len(Q_LENS) * max(Q_LENS) * (max(K_LENS) + prefix)
    assert counter.get_total_flops() == 2 * HEADS * (DIM + VALUE_DIM) * pairs
