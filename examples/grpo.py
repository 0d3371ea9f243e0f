"""Train a tiny policy by GRPO, with and without computing the prompt of each group once.

    python examples/grpo.py
    python examples/grpo.py --groups 2 --group-size 16 --prompt-length 256 --steps 10

After Shao et al., 2024 (https://arxiv.org/abs/2402.03300). A policy of four random layers writes a group of responses
to each prompt and is rewarded for the share of their tokens that are even: the advantage of a response is its reward,
less the group's mean, over the group's standard deviation. The rows of a group begin with the same prompt,
so ``share_prefixes(policy)``, one line, lets an update compute every prompt once. The same training runs both ways, and
ends with a table of rewards, tokens and seconds, and a picture (``OUTPUT_DIR/grpo.png``). It needs no network.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from report import plt, print_table
from torch import Tensor
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefix_kernels.integrations.transformers import share_prefixes

VOCABULARY, PAD = 64, 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--groups", type=int, default=4, help="prompts in a batch")
    add("--group-size", type=int, default=8, help="responses to each")
    add("--prompt-length", type=int, default=128, help="in tokens")
    add("--response-length", type=int, default=16, help="in tokens")
    add("--steps", type=int, default=20, help="updates of the policy")
    add("--learning-rate", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--output-dir", type=Path, default=Path("runs/grpo"))
    arguments = parser.parse_args()
    if arguments.group_size < 2:
        parser.error(f"--group-size: expected at least 2 responses to compare, got {arguments.group_size}")
    return arguments


def make_policy(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    # No token ends a response early.
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=2))


def make_prompts(arguments: argparse.Namespace) -> Tensor:
    """One row of random tokens for each response, ``[groups * group_size, prompt_length]``."""
    prompts = torch.randint(PAD + 1, VOCABULARY, (arguments.groups, arguments.prompt_length))
    return prompts.repeat_interleave(arguments.group_size, dim=0)


def rewards_of(responses: Tensor) -> Tensor:
    """The share of each response's tokens that are even."""
    return (responses % 2 == 0).float().mean(-1)


def advantages_of(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def loss_of(policy: PreTrainedModel, rows: Tensor, advantages: Tensor, response_length: int) -> Tensor:
    """Policy gradient of one update: the policy is the one that wrote the responses."""
    logits = policy(rows, use_cache=False, logits_to_keep=response_length + 1).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, rows[:, -response_length:, None])[..., 0]
    return -(advantages[:, None] * chosen).mean()


@dataclass
class Run:
    """The course of one training: by update, the mean reward, the seconds that it took and the tokens it computed."""

    rewards: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def train(policy: PreTrainedModel, arguments: argparse.Namespace, title: str) -> Run:
    run, computed = Run(), []
    policy.model.layers[0].register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:2].numel()))
    optimizer = torch.optim.AdamW(policy.parameters(), arguments.learning_rate, weight_decay=0.0)
    torch.manual_seed(arguments.seed)
    length = arguments.response_length
    with trange(arguments.steps, desc=title) as progress:
        for _ in progress:
            prompts = make_prompts(arguments)
            rows = policy.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                min_new_tokens=length,
                max_new_tokens=length,
            )
            rewards = rewards_of(rows[:, -length:])
            computed.clear()
            start = time.perf_counter()
            loss_of(policy, rows, advantages_of(rewards, arguments.group_size), length).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.seconds.append(time.perf_counter() - start)
            run.tokens.append(sum(computed))
            run.rewards.append(rewards.mean().item())
            progress.set_postfix(reward=f"{run.rewards[-1]:.3f}")
    return run


def draw(runs: dict[str, Run], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        left.plot(run.rewards, style, label=name, linewidth=2)
    left.set(xlabel="update", ylabel="mean reward", title="The same rewards")
    left.legend()
    right.bar(list(runs), [1000 * statistics.median(run.seconds) for run in runs.values()])
    right.set(ylabel="ms per update", title="Forward, backward and optimizer")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    plain, shared = make_policy(arguments.seed), share_prefixes(make_policy(arguments.seed))
    runs = {"every row": train(plain, arguments, "Every row"), "shared prompts": train(shared, arguments, "Shared")}
    every_row, sharing = runs.values()
    print_table(
        {
            "mean reward, first update": [f"{run.rewards[0]:.3f}" for run in runs.values()],
            "mean reward, last update": [f"{run.rewards[-1]:.3f}" for run in runs.values()],
            "tokens computed per update": [f"{run.tokens[-1]:,}" for run in runs.values()],
            "seconds per update": [f"{statistics.median(run.seconds):.3f}" for run in runs.values()],
        },
        ["", *runs],
    )
    difference = max(abs(one - other) for one, other in zip(every_row.rewards, sharing.rewards, strict=True))
    ratio = statistics.median(every_row.seconds) / statistics.median(sharing.seconds)
    print(f"\nLargest difference of a mean reward: {difference:.4f}. An update is {ratio:.1f} times as fast.")
    draw(runs, arguments.output_dir / "grpo.png")
    print(f"Picture: {arguments.output_dir / 'grpo.png'}")


if __name__ == "__main__":
    main()
