"""Serve several tasks from one frozen model in one batch: every row names its own prefix, or two, or none.

    python examples/mixed_batch.py "Anna walked to the"
    python examples/mixed_batch.py --model gpt2 --learning-rate 1e-2

Without arguments it needs no network: it first pretrains a tiny model on stories (``stories.py``), kept in OUTPUT_DIR.
It trains two tasks, the moods "cheerful" and "gloomy", and two users, a sailor who reads of the sea and a gardener,
each as a prefix of its own that knows nothing of the others, and stores them. One model then loads all four. It shows
that in a mixed batch each row gets what it gets alone, counts what task, user and both do to the texts, times one mixed
batch against a loop over the tasks, and ends with a table and a picture (``OUTPUT_DIR/mixed_batch.png``).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stories
import torch
from report import plt, print_table
from tiny_model import add_model_options, layers_that_see_all, open_model, train
from torch import Tensor
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    initialize_like_keys,
    load_named_prefix,
    load_prefix_model,
    save_prefix_model,
    select_prefixes,
    set_prefix,
)

# What each prefix is trained on: stories in one mood, or about one subject.
TASKS = {"cheerful": {"mood": "cheerful"}, "gloomy": {"mood": "gloomy"}}
USERS = {"sailor": {"subject": "sea"}, "gardener": {"subject": "garden"}}
ROWS = ["cheerful", "gloomy", "sailor", ["gloomy", "sailor"], ["cheerful", "gardener"], None]
TIMED_ROUNDS = 9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", default="Anna walked to the", help="what every row goes on from")
    add_model_options(parser, pretraining_steps=500, output_dir="runs/mixed_batch")
    add("--num-virtual-tokens", type=int, default=16, help="length of every prefix")
    add("--max-steps", type=int, default=80, help="training steps of each prefix")
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, default=0.1)
    add("--samples", type=int, default=40, help="texts sampled for each kind of row")
    add("--max-new-tokens", type=int, default=32)
    return parser.parse_args()


def title_of(row: str | list[str] | None) -> str:
    return "none" if row is None else row if isinstance(row, str) else " + ".join(row)


def train_prefix(folder: str, name: str, path: Path, arguments: argparse.Namespace) -> None:
    """Train one prefix on a frozen model and store it in ``path``."""
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = PrefixTuningConfig(
        num_virtual_tokens=arguments.num_virtual_tokens,
        layers=layers_that_see_all(model.config),
        position_offset="none",  # a text's positions are the same after one prefix, two or none
    )
    get_prefix_model(model, config).train()
    batch = stories.batches(random.Random(f"{name} {arguments.seed}"), arguments.batch_size, **(TASKS | USERS)[name])
    initialize_like_keys(model, input_ids=batch(tokenizer, 0.0)["input_ids"])
    train(
        model.parameters(),
        lambda step: model(**batch(tokenizer, 0.0)).loss,
        steps=arguments.max_steps,
        learning_rate=arguments.learning_rate,
        title=f"Training {name!r}",
    )
    save_prefix_model(model, path)


def load_all(folder: str, paths: dict[str, Path]) -> PreTrainedModel:
    """One model with all the prefixes."""
    first = next(iter(paths.values()))  # gets the name "default"
    model = load_prefix_model(AutoModelForCausalLM.from_pretrained(folder), first)
    for name, path in paths.items():
        load_named_prefix(model, name, path)
    return model.requires_grad_(False).eval()


def generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], arguments: argparse.Namespace, **options: Any
) -> Tensor:
    return model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, **{"do_sample": False} | options)


def alone(
    model: PreTrainedModel, plain: PreTrainedModel, row: str | list[str] | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What to call, and how, for this row alone; without naming prefixes in the call, where that can be."""
    if row is None:
        return plain, {}
    if isinstance(row, list):
        return model, {"prefix_names": [row]}
    set_prefix(model, row)
    return model, {}


@torch.no_grad()
def compare_with_alone(
    model: PreTrainedModel, plain: PreTrainedModel, tokenizer: Any, arguments: argparse.Namespace
) -> tuple[list[str], list[bool], float]:
    """What a mixed batch of all rows writes; which rows write the same alone; and the largest difference of logits."""
    one = tokenizer([arguments.prompt], return_tensors="pt")
    batch = {name: x.repeat(len(ROWS), 1) for name, x in one.items()}
    mixed = generate(model, batch, arguments, prefix_names=ROWS)
    texts = tokenizer.batch_decode(mixed, skip_special_tokens=True)
    logits = model(mixed, prefix_names=ROWS).logits
    same, largest = [], 0.0
    for number, row in enumerate(ROWS):
        called, names = alone(model, plain, row)
        (ids,) = generate(called, one, arguments, **names)
        same.append(tokenizer.decode(ids, skip_special_tokens=True) == texts[number])
        of_row = slice(number, number + 1)
        difference = called(mixed[of_row], **names).logits - logits[of_row]
        largest = max(largest, difference.abs().max().item())
    return texts, same, largest


def sampled_shares(model: PreTrainedModel, tokenizer: Any, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """What part of the mood words in a row's texts are cheerful, gloomy, and so on; all rows in one mixed batch."""
    torch.manual_seed(arguments.seed)
    names = [row for row in ROWS for _ in range(arguments.samples)]
    inputs = tokenizer([arguments.prompt] * len(names), return_tensors="pt")
    texts = tokenizer.batch_decode(
        generate(model, inputs, arguments, prefix_names=names, do_sample=True), skip_special_tokens=True
    )
    shares = []
    for number in range(len(ROWS)):
        own = texts[number * arguments.samples : (number + 1) * arguments.samples]
        shares.append(
            {name: stories.share(own, stories.MOODS, kind["mood"]) for name, kind in TASKS.items()}
            | {name: stories.share(own, stories.SUBJECTS, kind["subject"]) for name, kind in USERS.items()}
        )
    return shares


@torch.no_grad()
def seconds_per_forward(
    model: PreTrainedModel, tokenizer: Any, rows_per_task: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Median time of a forward pass over some rows of every task: one mixed batch, and a loop over the tasks."""
    names = [*TASKS, *USERS]
    ids = tokenizer([stories.tell(random.Random(0))], return_tensors="pt")["input_ids"]

    # Stacks the prefixes once; with names in its place every call would do so.
    selections = {rows: select_prefixes(model, [name for name in names for _ in range(rows)]) for rows in rows_per_task}

    def mixed(rows: int) -> None:
        model(ids.expand(rows * len(names), -1), prefix_names=selections[rows])

    def loop(rows: int) -> None:
        for name in names:
            set_prefix(model, name)
            model(ids.expand(rows, -1))

    times = {rows: {"one mixed batch": [], "loop over tasks": []} for rows in rows_per_task}
    for _ in trange(1 + TIMED_ROUNDS, desc="Timing"):  # taking turns; the first round warms up
        for rows, of in times.items():
            for way, forward in zip(of, (mixed, loop), strict=True):
                start = time.perf_counter()
                forward(rows)
                of[way].append(time.perf_counter() - start)
    return {rows: {way: statistics.median(one[1:]) for way, one in of.items()} for rows, of in times.items()}


def plot(shares: list[dict[str, float]], seconds: dict[int, dict[str, float]], path: Path) -> None:
    """What each row's texts are about, and how long a mixed batch takes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    values = [list(row.values()) for row in shares]
    left.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            left.text(x, y, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black")
    left.set_xticks(range(len(shares[0])), [f"{name}\nwords" for name in shares[0]])
    left.set_yticks(range(len(ROWS)), [title_of(row) for row in ROWS])
    left.set(title="Texts of a mixed batch", ylabel="prefixes of the row")
    for way in next(iter(seconds.values())):
        right.plot(list(seconds), [1e3 * of[way] for of in seconds.values()], marker="o", label=way)
    right.set(xlabel=f"rows per task, {len(TASKS | USERS)} tasks", ylabel="ms per forward pass", ylim=(0, None))
    right.set(title="One call or one per task")
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments()
    folder, tokenizer = open_model(arguments, stories.vocabulary(), stories.batches(random.Random(arguments.seed), 16))
    paths = {name: arguments.output_dir / f"{name}.safetensors" for name in TASKS | USERS}
    for name, path in paths.items():
        train_prefix(folder, name, path, arguments)

    model = load_all(folder, paths)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts, same, largest = compare_with_alone(model, plain, tokenizer, arguments)
    shares = sampled_shares(model, tokenizer, arguments)
    seconds = seconds_per_forward(model, tokenizer, rows_per_task=[1, 2, 4, 8])
    print(f"\nOne batch of {len(ROWS)} rows:")
    for row, text in zip(ROWS, texts, strict=True):
        print(f"  {title_of(row):<20}  {text}")

    picture = arguments.output_dir / "mixed_batch.png"
    plot(shares, seconds, picture)
    table = {
        "rows that write the same alone": f"{sum(same)} of {len(same)}",
        "largest difference of logits": f"{largest:.1e}",
        "saved file of one prefix": f"{max(path.stat().st_size for path in paths.values()) / 1024:.1f} KiB",
    }
    for row, share in zip(ROWS, shares, strict=True):
        for name in TASKS | USERS if row is None else [row] if isinstance(row, str) else row:
            table[f"{name} words, row of {title_of(row)}"] = f"{share[name]:.1%}"
    for rows, of in seconds.items():
        for way, one in of.items():
            table[f"ms, {len(TASKS | USERS)} tasks x {rows} rows, {way}"] = f"{1e3 * one:.1f}"
    print_table(table)
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
