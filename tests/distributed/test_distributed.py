"""More than one device: two processes give the loss and the gradients of one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import INPUT_NAMES, Call, make_call
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import WORLD, assert_gradients_of_one, own_rows, run_on_two_processes

from prefix_kernels import PrefixEncoder, prefix_attention, prefix_attention_varlen
from prefix_kernels.distributed import PrefixParallel

BATCH, HEADS = Shard(0), Shard(1)


def _calls() -> dict[str, Call]:
    ids = torch.tensor([1, -1, 0, 1])
    sizes = {"batch": 4, "q_heads": 4, "kv_heads": 2, "q_len": 9, "k_len": 11, "layout": "contiguous"}
    padding = torch.ones(4, 1, 1, 11, dtype=torch.bool)
    padding[1, ..., 7:] = False
    return {
        "one prefix": make_call(**sizes),
        "causal with padding": make_call(**sizes, is_causal=True, attn_mask=padding),
        "a mask of every head": make_call(**sizes, attn_mask=torch.randn(4, 9, 16)),
        "a bank": make_call(
            **sizes, num_prefixes=2, prefix_ids=ids, prefix_lens=torch.tensor([3, 5]), query_offset=torch.arange(4)
        ),
        "one prefix per row": make_call(**sizes, num_prefixes=4),
        "values of another head dim": make_call(**sizes, value_dim=6),
        "no prefix": make_call(**sizes, prefix_len=None),
    }


def _calls_of_the_split() -> dict[str, Call]:
    sizes = {"batch": 4, "q_heads": 4, "kv_heads": 4, "q_len": 9, "k_len": 9, "head_dim": 8, "layout": "contiguous"}
    ids = torch.tensor([1, -1, 0, 1])
    return {
        "one prefix": make_call(**sizes),
        "causal, a bank": make_call(
            **sizes, is_causal=True, num_prefixes=2, prefix_ids=ids, prefix_lens=torch.tensor([3, 5])
        ),
        "no prefix": make_call(**sizes, prefix_len=None),
    }


class _OperatorNames(TorchDispatchMode):
    """Keeps the names of the operators that run while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _result(call: Call, inputs: dict[str, Tensor | None], backend: str) -> dict[str, Tensor]:
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    with _OperatorNames() as operators:
        out, lse = prefix_attention(**leaves, **call.options, return_lse=True, backend=backend)
    assert ("prefix_kernels::split_forward" in operators.names) == (backend == "split")
    dout, dlse = call.dout.to(out.dtype), call.dlse.to(lse.dtype)
    if isinstance(out, DTensor):
        dout, dlse = (distribute_tensor(x, out.device_mesh, out.placements) for x in (dout, dlse))
    # With a gradient of lse, the backward of the split is that of the fused kernels.
    results, gradients = ([out], [dout]) if backend == "split" else ([out, lse], [dout, dlse])
    torch.autograd.backward(results, gradients)
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
    return {"out": out, "lse": lse} | grads


def _check_sharded_calls() -> None:
    _check_shards(_calls(), "fused")


def _check_sharded_calls_of_the_split() -> None:
    _check_shards(_calls_of_the_split(), "split")


def _check_shards(calls: dict[str, Call], backend: str) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, call in calls.items():
        expected = _result(call, call.inputs, backend)
        for placement in (BATCH, HEADS, Replicate()):
            sharded = {n: x if x is None else distribute_tensor(x, mesh, [Replicate()]) for n, x in call.inputs.items()}
            for n in ("query", "key", "value"):
                sharded[n] = sharded[n].redistribute(placements=[placement])
            got = _result(call, sharded, backend)
            assert got["out"].placements == got["lse"].placements == (placement,)
            assert got["out"].stride() == expected["out"].stride()
            for n, x in expected.items():
                assert torch.allclose(got[n].full_tensor(), x, rtol=1e-5, atol=1e-5), (name, placement, n)


def test_an_operator_call_on_shards_gives_the_result_of_the_whole(tmp_path: Path) -> None:
    run_on_two_processes(_check_sharded_calls, tmp_path)


def test_the_split_on_shards_gives_the_result_of_the_whole(tmp_path: Path) -> None:
    run_on_two_processes(_check_sharded_calls_of_the_split, tmp_path)


def _check_packed_shards() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    starts = torch.tensor([0, 3, 3, 9])
    bank = {"prefix_ids": torch.tensor([[1, -1], [0, 1], [0, -1]])}
    prefixes = {
        "one prefix": (torch.randn(2, 5, 8), torch.randn(2, 5, 6), {}),
        "a bank": (torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6), bank | {"prefix_lens": torch.tensor([5, 3])}),
        "a packed bank": (
            torch.randn(7, 2, 8),
            torch.randn(7, 2, 6),
            bank | {"cu_prefix_lens": torch.tensor([0, 4, 7])},
        ),
    }
    sequences = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 6)
    for name, (prefix_key, prefix_value, options) in prefixes.items():
        options = options | {"cu_seqlens_q": starts, "is_causal": True, "return_lse": True}
        leaves = [x.detach().requires_grad_() for x in (*sequences, prefix_key, prefix_value)]
        out, lse = prefix_attention_varlen(*leaves, **options)
        (out.square().sum() + lse.sum()).backward()
        for placement in (HEADS, Replicate()):
            shards = [distribute_tensor(x.detach(), mesh, [Replicate()]) for x in leaves]
            shards[:3] = [x.redistribute(placements=[placement]) for x in shards[:3]]
            shards = [x.detach().requires_grad_() for x in shards]
            got, got_lse = prefix_attention_varlen(*shards, **options)
            assert got.placements == (placement,) and got.stride() == out.stride(), (name, placement)
            (got.square().sum() + got_lse.sum()).full_tensor().backward()
            ours = [got, got_lse, *(x.grad for x in shards)]
            for shard, whole in zip(ours, [out, lse, *(x.grad for x in leaves)], strict=True):
                assert torch.allclose(shard.full_tensor(), whole, rtol=1e-5, atol=1e-5), (name, placement)

    rows = [distribute_tensor(torch.randn(4, 2, 8), mesh, [Shard(0)])] * 3
    with pytest.raises(ValueError, match=r"query: expected placements among Replicate\(\), Shard\(1\) \(heads\), got"):
        prefix_attention_varlen(*rows, cu_seqlens_q=torch.tensor([0, 4]))
    ones = [distribute_tensor(torch.ones(64, 2, 8), mesh, [HEADS])] * 3
    seeds = {"dropout_p": 0.5, "dropout_seed": torch.tensor([7])}
    dropped = prefix_attention_varlen(*ones, cu_seqlens_q=torch.tensor([0, 64]), **seeds).full_tensor()
    assert not torch.equal(dropped[:, 0], dropped[:, 1])


def test_packed_sequences_on_shards_give_the_result_of_the_whole(tmp_path: Path) -> None:
    run_on_two_processes(_check_packed_shards, tmp_path)


def _check_mixed_and_refused() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    call = _calls()["one prefix"]
    expected = _result(call, call.inputs, "fused")
    # A plain parameter counts as held whole by everyone.
    prefixes = [call.inputs[name].clone().requires_grad_() for name in ("prefix_key", "prefix_value")]
    query, key, value = (distribute_tensor(call.inputs[name], mesh, [HEADS]) for name in INPUT_NAMES[:3])
    out, lse = prefix_attention(query, key, value, *prefixes, return_lse=True)
    torch.testing.assert_close(out.full_tensor(), expected["out"])
    torch.autograd.backward([out, lse], [distribute_tensor(x.float(), mesh, [HEADS]) for x in (call.dout, call.dlse)])
    for prefix, name in zip(prefixes, ("dprefix_key", "dprefix_value"), strict=True):
        torch.testing.assert_close(prefix.grad, expected[name])

    # Dropout: the shards drop different elements.
    same = torch.ones(2, 2, 64, 8)
    dropped = prefix_attention(
        *(distribute_tensor(same, mesh, [HEADS]) for _ in range(3)),
        dropout_p=0.5,
        dropout_seed=torch.tensor([7]),
    ).full_tensor()
    assert not torch.equal(dropped[:, 0], dropped[:, 1])

    with pytest.raises(ValueError, match=r"query: expected placements among .*got Shard\(dim=2\)|S\(2\)"):
        prefix_attention(*(distribute_tensor(same, mesh, [Shard(2)]) for _ in range(3)))
    with pytest.raises(ValueError, match="key: expected a number of heads that divides over 2 processes, got 1"):
        prefix_attention(
            distribute_tensor(same, mesh, [HEADS]), *(distribute_tensor(same[:, :1], mesh, [Replicate()]),) * 2
        )
    with pytest.raises(TypeError, match="query: expected a DTensor like the other inputs, got Tensor"):
        prefix_attention(same, *(distribute_tensor(same, mesh, [HEADS]),) * 2)


def test_plain_tensors_beside_shards_and_what_is_refused(tmp_path: Path) -> None:
    run_on_two_processes(_check_mixed_and_refused, tmp_path)


class Attention(nn.Module):
    """Self-attention with a prefix whose heads the process may hold only a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(prefix_attention(q, k, v, *prefix, is_causal=True).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, projection: bool) -> None:
        super().__init__()
        self.prefix_encoder = PrefixEncoder(5, 2, 4, 8, projection=projection)
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer, prefix in zip(self.layers, self.prefix_encoder(), strict=True):
            x = x + layer(x, prefix)
        return x


def _check_training() -> None:
    for how in ("ddp", "fsdp", "fsdp, an encoder of its own", "tensor-parallel"):
        for projection in (False, True):
            _check_gradients(how, projection)


def _check_gradients(how: str, projection: bool) -> None:
    torch.manual_seed(0)
    whole, x = Model(projection), torch.randn(4, 7, 32)
    whole.layers.requires_grad_(False)
    model = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (WORLD,))
    rows = own_rows(4)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif how.startswith("fsdp"):
        for layer in [*model.layers, *([model.prefix_encoder] if how.endswith("of its own") else [])]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        rows = slice(None)
        split = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
        plan = {f"layers.{i}.{name}": style for i in range(2) for name, style in split.items()}
        parallelize_module(model, mesh, plan | {"prefix_encoder": PrefixParallel()})
        assert projection or model.prefix_encoder.table.to_local().shape == (5, 4, 2, 8)
    whole(x).square().mean().backward()
    model(x[rows]).square().mean().backward()
    assert_gradients_of_one(model, whole, how)


def test_training_on_two_processes_gives_the_gradients_of_one(tmp_path: Path) -> None:
    run_on_two_processes(_check_training, tmp_path)
