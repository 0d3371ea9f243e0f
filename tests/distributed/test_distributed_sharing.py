"""`share_prefixes` under DDP and FSDP2: two processes give the gradients of one."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from two_processes import assert_gradients_of_one, own_rows, run_on_two_processes

from prefix_kernels.integrations.transformers import share_prefixes


def batch() -> torch.Tensor:
    """Two groups of two rows, each with a prompt of 10 tokens, in an order in which each process has one group."""
    prompts = torch.arange(3, 23).view(2, 10).repeat_interleave(2, dim=0)
    return torch.cat([prompts, torch.arange(30, 42).view(4, 3)], 1)


def loss_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids, use_cache=False).logits.square().mean()


def check_sharing() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    whole: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, initializer_range=0.3))
    shared = share_prefixes(copy.deepcopy(whole))
    loss_of(whole, batch()).backward()
    for kind in ("ddp", "fsdp2"):
        model = copy.deepcopy(shared)
        tokens = []
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda _, args, tokens=tokens: tokens.append(args[0].shape[1])
        )
        if kind == "fsdp2":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        else:
            model = nn.parallel.DistributedDataParallel(model)
        loss_of(model, batch()[own_rows(4)]).backward()
        assert tokens == [10 + 3 + 3], kind
        assert_gradients_of_one(model, whole, kind)


def test_sharing_on_two_processes_gives_the_gradients_of_one(tmp_path: Path) -> None:
    run_on_two_processes(check_sharing, tmp_path)
