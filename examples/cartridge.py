"""Distil a document into a cartridge: a long trained prefix, with which a frozen model goes on as if it had read it.

    python examples/cartridge.py
    python examples/cartridge.py --num-virtual-tokens 256 --shorter 64 --people 60 --max-steps 600
    python examples/cartridge.py --model HuggingFaceTB/SmolLM2-135M --document report.txt --learning-rate 5e-3

After Eyuboglu et al., 2025 (https://arxiv.org/abs/2506.06266). The prefix begins as the keys and values of the first
tokens of the document. The model with the document in its context writes texts about it; the model with the prefix and
no document learns to give their tokens the same probabilities: the Kullback-Leibler divergence is the loss.

Without arguments it needs no network: it first pretrains a tiny model, kept in OUTPUT_DIR, to look things up in texts
about made-up villages (``village.py``); the document describes one that it has not read about. It ends with a table
that compares no document, the document, and prefixes before and after training, and with a picture
(``OUTPUT_DIR/cartridge.png``).
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import village
from report import plt, print_table
from tiny_model import add_model_options, layers_that_see_all, open_model, train
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    initialize_from_text,
    load_prefix_model,
    save_prefix_model,
)

MENTIONS = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_options(parser, pretraining_steps=300, output_dir="runs/cartridge")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--document", type=Path, help="text file to distil (default: a description of a village)")
    source.add_argument("--people", type=int, default=48, help=f"in that village, at most {len(village.NAMES)}")
    add("--num-virtual-tokens", type=int, default=192, help="length of the cartridge")
    add("--shorter", type=int, default=48, help="length of a second one, to compare with")
    add("--samples", type=int, default=160, help="texts written about the document; a fifth is held out")
    add("--sample-length", type=int, default=64, help="their tokens")
    add("--max-steps", type=int, default=150, help="training steps of each cartridge")
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, default=2e-2)
    arguments = parser.parse_args()
    if not 1 <= arguments.people <= len(village.NAMES):
        parser.error(f"--people: expected 1 to {len(village.NAMES)}, got {arguments.people}")
    if arguments.samples < 5:
        parser.error(f"--samples: expected at least 5, of which one is held out, got {arguments.samples}")
    return arguments


@dataclass
class SelfStudy:
    """Texts ``ids [N, T]`` that the model wrote after reading the document, and what it then expected.

    ``expected [N, T, V]``: the log-probabilities of each token.
    """

    ids: Tensor
    expected: Tensor

    def rows(self, which: Tensor | slice) -> SelfStudy:
        return SelfStudy(self.ids[which], self.expected[which])


def log_probabilities(model: PreTrainedModel, context: Tensor, ids: Tensor) -> Tensor:
    """What ``model`` expects for each token of ``ids [N, T]`` after ``context [C]``: ``[N, T, V]``."""
    inputs = torch.cat([context.expand(len(ids), -1), ids], dim=1)
    # All before the context's last position is not looked at.
    logits = model(input_ids=inputs, logits_to_keep=ids.shape[1] + 1).logits
    return logits[:, :-1].float().log_softmax(-1)


def divergence(predicted: Tensor, expected: Tensor) -> Tensor:
    """``KL(expected || predicted)`` per token of log-probabilities ``[N, T, V]``."""
    return F.kl_div(predicted.flatten(0, 1), expected.flatten(0, 1), reduction="batchmean", log_target=True)


@torch.no_grad()
def self_study(model: PreTrainedModel, document: Tensor, arguments: argparse.Namespace) -> SelfStudy:
    """Texts that ``model`` writes with ``document [C]`` in its context."""
    ids, expected = [], []
    for first in range(0, arguments.samples, arguments.batch_size):
        read = document.expand(min(arguments.batch_size, arguments.samples - first), -1)
        written = model.generate(
            read,
            attention_mask=torch.ones_like(read),
            do_sample=True,
            top_k=0,
            min_new_tokens=arguments.sample_length,
            max_new_tokens=arguments.sample_length,
        )
        ids.append(written[:, len(document) :])
        expected.append(log_probabilities(model, document, ids[-1]))
    return SelfStudy(torch.cat(ids), torch.cat(expected))


@dataclass
class Measured:
    """How well a model does on texts held out, what it answers, and how much it holds in memory to do so."""

    divergence: float
    perplexity: float
    right: float | None
    kibibytes: float


@torch.no_grad()
def measure(
    model: PreTrainedModel, context: Tensor, held_out: SelfStudy, answers: dict[str, str], tokenizer: Any, nbytes: int
) -> Measured:
    model.eval()
    predicted = log_probabilities(model, context, held_out.ids)
    surprise = -predicted.gather(-1, held_out.ids.unsqueeze(-1)).mean()
    right = None
    if answers:
        questions = tokenizer(list(answers), add_special_tokens=False, return_tensors="pt")["input_ids"]
        inputs = torch.cat([context.expand(len(questions), -1), questions], dim=1)
        given = tokenizer.convert_ids_to_tokens(model(input_ids=inputs).logits[:, -1].argmax(-1))
        right = sum(map(str.__eq__, given, answers.values())) / len(answers)
    return Measured(divergence(predicted, held_out.expected).item(), surprise.exp().item(), right, nbytes / 1024)


def cache_size(model: PreTrainedModel, ids: Tensor) -> int:
    """Bytes of the keys and values that the model keeps of a text ``ids [T]``."""
    with torch.no_grad():
        cache = model(input_ids=ids.unsqueeze(0), use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def make_cartridge(folder: str, document: Tensor, length: int) -> PreTrainedModel:
    """The model with a prefix that is the document's first tokens, of which the very first stays as it is."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = PrefixTuningConfig(
        num_virtual_tokens=length,
        num_frozen_tokens=1,
        layers=layers_that_see_all(model.config),
    )
    get_prefix_model(model, config)
    initialize_from_text(model, document)
    return model


def distil(
    model: PreTrainedModel, start: Tensor, study: SelfStudy, arguments: argparse.Namespace, title: str
) -> list[float]:
    """Train the prefix of ``model``; the divergence at each step."""
    generator = torch.Generator().manual_seed(arguments.seed)

    def loss_of(step: int) -> Tensor:
        batch = study.rows(torch.randint(len(study.ids), (arguments.batch_size,), generator=generator))
        return divergence(log_probabilities(model, start, batch.ids), batch.expected)

    return train(
        model.parameters(), loss_of, steps=arguments.max_steps, learning_rate=arguments.learning_rate, title=title
    )


def plot(curves: dict[str, list[float]], measured: dict[str, Measured], path: Path) -> None:
    """The loss of each cartridge, and what each context costs in memory and in divergence from the document."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, losses in curves.items():
        left.plot(losses, label=name, linewidth=1)
    left.axhline(measured["no document"].divergence, color="gray", linestyle="--", label="no document")
    left.set(xlabel="step", ylabel="KL from the model with the document", title="Distilling", ylim=(0, None))
    left.legend()
    for name, one in measured.items():
        right.plot(one.kibibytes, one.divergence, "o")
        right.annotate(name, (one.kibibytes, one.divergence), xytext=(5, 5), textcoords="offset points", fontsize=8)
    largest = max(one.kibibytes for one in measured.values())
    right.set(xlabel="keys and values held, KiB", ylabel="KL on held-out texts", title="What it costs")
    right.set(xlim=(-0.05 * largest, 1.3 * largest))  # room for names
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments()
    folder, tokenizer = open_model(arguments, village.vocabulary(), village.batches(random.Random(arguments.seed)))
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()

    answers = {}
    if arguments.document is None:
        generator = random.Random(arguments.seed + 1)
        does = village.settle(generator, arguments.people)
        text = village.describe(generator, does, MENTIONS)
        if tokenizer.get_vocab().keys() >= set(village.vocabulary()):  # so that an answer is one token
            answers = does
    else:
        text = arguments.document.read_text(encoding="utf-8")
    document = tokenizer(text, return_tensors="pt")["input_ids"][0]
    start = document[:1] if tokenizer.bos_token_id is None else torch.tensor([tokenizer.bos_token_id])
    print(f"The document has {len(document)} tokens: {text[:100]} ...")

    study = self_study(plain, document, arguments)
    held_out, train_on = study.rows(slice(arguments.samples // 5)), study.rows(slice(arguments.samples // 5, None))
    print(f"Of {arguments.samples} texts written about it, one: {tokenizer.decode(study.ids[0])[:100]} ...")

    def measured_with(model: PreTrainedModel, context: Tensor, nbytes: int) -> Measured:
        return measure(model, context, held_out, answers, tokenizer, nbytes)

    measured = {
        "no document": measured_with(plain, start, 0),
        "the document": measured_with(plain, document, cache_size(plain, document)),
    }
    curves = {}
    for length in (arguments.shorter, arguments.num_virtual_tokens):
        model = make_cartridge(folder, document, length)
        nbytes = sum(tensor.nbytes for tensor in model.prefix_encoder.state_dict().values())
        measured[f"{length} tokens, untrained"] = measured_with(model, start, nbytes)
        curves[f"{length} tokens"] = distil(model, start, train_on, arguments, f"Distilling into {length} tokens")
        measured[f"{length} tokens"] = measured_with(model, start, nbytes)

    task = arguments.output_dir / "cartridge.safetensors"
    save_prefix_model(model, task)
    fresh = load_prefix_model(AutoModelForCausalLM.from_pretrained(folder), task).eval()
    prompt = torch.cat([start, study.ids[0, :1]]).unsqueeze(0)
    written = [one.eval().generate(prompt, max_new_tokens=32, do_sample=False) for one in (model, fresh)]
    print(f"\nWritten by a fresh model with {task}:\n  {tokenizer.decode(written[1][0], skip_special_tokens=True)}")

    picture = arguments.output_dir / "cartridge.png"
    plot(curves, measured, picture)
    header = ["context", "KL per token", "perplexity", "keys and values"]
    rows = {
        name: [f"{one.divergence:.3f}", f"{one.perplexity:.2f}", f"{one.kibibytes:.1f} KiB"]
        for name, one in measured.items()
    }
    if answers:
        header.append("people known")
        for name, one in measured.items():
            rows[name].append(f"{one.right:.1%}")
    print_table(rows, header)
    print_table(
        {
            "document": f"{len(document)} tokens",
            "saved cartridge": f"{task.stat().st_size / 1024:.0f} KiB",
            "a fresh model writes the same": "yes" if torch.equal(*written) else "no",
        }
    )
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
