"""Prefix-tune a frozen causal language model to one style, and generate with it before and after.

    python examples/causal_lm.py "Anna walked to the" "then Hugo"
    python examples/causal_lm.py --style cheerful --num-virtual-tokens 4
    python examples/causal_lm.py --model gpt2 --train-file lines.txt --learning-rate 1e-2

Without arguments it needs no network: it first pretrains a tiny model on stories of three moods (``stories.py``), kept
in OUTPUT_DIR, freezes it, and tunes a prefix on stories of one mood. It prints what the model writes without and with
the prefix, saves the task as one small file, loads that into a fresh model, which must write the same, and ends with a
table and a picture (``OUTPUT_DIR/style.png``).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import stories
import torch
from report import plt, print_table
from tiny_model import add_model_options, layers_that_see_all, open_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    initialize_like_keys,
    load_prefix_model,
    save_prefix_model,
)

PROMPTS = ["Anna walked to the", "Hugo found a", "the"]
TRAIN_STORIES, HELD_OUT_STORIES, SAMPLES = 256, 64, 48


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", default=PROMPTS, help="beginnings to go on from")
    add_model_options(parser, pretraining_steps=500, output_dir="runs/causal_lm")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--style", choices=sorted(stories.MOODS), default="gloomy", help="mood of the stories to tune on"
    )
    source.add_argument("--train-file", type=Path, help="tune on this text, one example per line; a fifth is held out")
    add("--num-virtual-tokens", type=int, default=16, help="prefix length of every layer")
    add("--epochs", type=float, default=4)
    add("--max-steps", type=int, default=-1, help="stop after this many steps")
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, default=0.1)
    add("--max-length", type=int, default=128, help="tokens of a text and its end; a longer one is cut")
    add("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.max_length < 2:
        parser.error(f"--max-length: expected at least 2, of which one ends the text, got {arguments.max_length}")
    if arguments.train_file is not None:
        if not arguments.train_file.is_file():
            parser.error(f"--train-file: expected a file, got {arguments.train_file}")
        if (count := len(lines_of(arguments.train_file))) < 5:
            parser.error(f"--train-file: expected at least 5 lines of text, of which one is held out, got {count}")
    return arguments


def lines_of(path: Path) -> list[str]:
    """The lines that hold text."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def load_texts(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The texts to tune on and those held out."""
    generator = random.Random(arguments.seed + 1)  # not the stories of pretraining
    if arguments.train_file is None:
        texts = [stories.tell(generator, arguments.style) for _ in range(TRAIN_STORIES + HELD_OUT_STORIES)]
        return texts[HELD_OUT_STORIES:], texts[:HELD_OUT_STORIES]
    texts = lines_of(arguments.train_file)
    generator.shuffle(texts)
    return texts[len(texts) // 5 :], texts[: len(texts) // 5]


def make_trainer(
    model: PreTrainedModel, tokenizer: Any, train: list[str], held_out: list[str], arguments: argparse.Namespace
) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(arguments.output_dir),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # of all steps
        use_cpu=not torch.accelerator.is_available(),
        seed=arguments.seed,
        eval_strategy="steps",
        eval_steps=0.125,  # of all steps
        logging_steps=0.05,
        save_strategy="no",  # the task is saved once, at the end, without the model
        report_to=[],
        disable_tqdm=False,  # the progress bar
        dataloader_pin_memory=torch.cuda.is_available(),
    )

    def encoded(texts: list[str]) -> list[dict[str, Any]]:
        ids = tokenizer(texts, truncation=True, max_length=arguments.max_length - 1)["input_ids"]
        ended = [row + [tokenizer.eos_token_id] for row in ids]
        return [{"input_ids": row, "labels": row} for row in ended]

    return Trainer(
        model,
        settings,
        # Takes no padding for a label, but the end of each text, even where that is the same token.
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=encoded(train),
        eval_dataset=encoded(held_out),
    )


def continuations(
    model: PreTrainedModel, tokenizer: Any, prompts: list[str], max_new_tokens: int, **options: Any
) -> list[str]:
    """What ``model`` makes of each prompt, greedily unless the ``options`` of ``generate`` say otherwise."""
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    ids = model.eval().generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **{"do_sample": False} | options
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def samples(model: PreTrainedModel, tokenizer: Any, arguments: argparse.Namespace) -> list[str]:
    """Texts of the model's own, drawn with the same seed each time."""
    torch.manual_seed(arguments.seed)
    return continuations(
        model,
        tokenizer,
        arguments.prompts,
        arguments.max_new_tokens,
        do_sample=True,
        num_return_sequences=-(-SAMPLES // len(arguments.prompts)),
    )


def plot(log: list[dict[str, float]], loss_before: float, shares: dict[str, list[float]], path: Path) -> None:
    """Loss over the steps, and how the words of each mood are divided before and after."""
    columns = 2 if shares else 1
    figure, axes = plt.subplots(1, columns, figsize=(5 * columns, 4), layout="constrained", squeeze=False)
    curve = axes[0, 0]
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    curve.plot(*zip(*losses, strict=True), color="tab:blue", marker=".", label="training")
    curve.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
    curve.axhline(loss_before, color="gray", linestyle="--", label="held out, without the prefix")
    curve.set(xlabel="step", ylabel="loss per token", title="Tuning the prefix", xlim=(0, None))
    curve.legend()
    if shares:
        bars = axes[0, 1]
        for offset, (name, values) in zip((-0.2, 0.2), shares.items(), strict=True):
            bars.bar([place + offset for place in range(len(values))], values, 0.4, label=name)
        bars.set_xticks(range(len(stories.MOODS)), list(stories.MOODS))
        bars.set(ylabel="share of the words of all moods", title=f"{SAMPLES} texts sampled", ylim=(0, 1))
        bars.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments()
    folder, tokenizer = open_model(arguments, stories.vocabulary(), stories.batches(random.Random(arguments.seed), 16))
    train, held_out = load_texts(arguments)

    base = AutoModelForCausalLM.from_pretrained(folder)
    trainer = make_trainer(base, tokenizer, train, held_out, arguments)
    loss_before = trainer.evaluate()["eval_loss"]
    before = continuations(base, tokenizer, arguments.prompts, arguments.max_new_tokens)
    sampled = {"before": samples(base, tokenizer, arguments)}

    config = PrefixTuningConfig(
        num_virtual_tokens=arguments.num_virtual_tokens,
        layers=layers_that_see_all(base.config),
        position_offset="none",  # the text keeps the positions that the model has been pretrained with
    )
    model = get_prefix_model(base, config)
    sample = tokenizer(train[:8], padding=True, truncation=True, max_length=arguments.max_length, return_tensors="pt")
    initialize_like_keys(model, **sample)
    trainer = make_trainer(model, tokenizer, train, held_out, arguments)
    trainer.train()
    loss_after = trainer.evaluate()["eval_loss"]
    after = continuations(model, tokenizer, arguments.prompts, arguments.max_new_tokens)
    sampled["after"] = samples(model, tokenizer, arguments)

    task = arguments.output_dir / "task.safetensors"
    save_prefix_model(model, task)
    fresh = load_prefix_model(AutoModelForCausalLM.from_pretrained(folder), task).to(model.device)
    again = continuations(fresh, tokenizer, arguments.prompts, arguments.max_new_tokens)
    for number, prompt in enumerate(arguments.prompts):
        print(f"\n{prompt} ...\n  without: {before[number]}\n  with   : {after[number]}\n  fresh  : {again[number]}")

    shares = {}
    if arguments.train_file is None:
        shares = {
            name: [stories.share(texts, stories.MOODS, mood) for mood in stories.MOODS]
            for name, texts in sampled.items()
        }
    picture = arguments.output_dir / "style.png"
    plot(trainer.state.log_history, loss_before, shares, picture)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    rows = {
        f"loss per token on {len(held_out)} held-out texts, without the prefix": f"{loss_before:.3f}",
        "the same with the prefix": f"{loss_after:.3f}",
    }
    style = list(stories.MOODS).index(arguments.style)
    for name, values in shares.items():
        rows[f"{arguments.style} words among those of all moods, {name}"] = f"{values[style]:.1%}"
    print_table(
        rows
        | {
            "trainable parameters": f"{trained:,} ({trained / everything:.2%})",
            "saved task file": f"{task.stat().st_size / 1024:.1f} KiB",
            "texts that a fresh model writes alike": f"{sum(map(str.__eq__, after, again))} of {len(after)}",
        }
    )
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
