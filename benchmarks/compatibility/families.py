"""Try a prefix in a tiny model of every model type of Transformers, and write what came of it.

python benchmarks/compatibility/families.py          # the CSV and docs/families.md
python benchmarks/compatibility/families.py --type llama gpt2  # these in all kinds, beside the lines that are there
python benchmarks/compatibility/families.py --kind causal --type llama gpt2  # prints, writes nothing
python benchmarks/compatibility/families.py --check  # fails if the page is not that of the CSV
"""

from __future__ import annotations

import argparse
import csv
import sys
import textwrap
from collections import Counter
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.compatibility.family_trial import (
    CACHE,
    KERNELS,
    NO_MEDIA,
    NOT_TRIED,
    REFUSED,
    RIGHT,
    Trial,
    try_family,
)
from benchmarks.compatibility.model_types import KINDS, model_types
from benchmarks.compatibility.peft_trial import EQUAL, FAILS, IN_PART, TASKS, TRAINS, try_peft

TABLE = Path(__file__).parents[1] / "results" / "families.csv"
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- begin: written from families.csv by families.py -->", "<!-- end -->"


def read(path: Path = TABLE) -> tuple[list[Trial], str]:
    """The lines of the CSV, and the version of Transformers that was tried."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    fields = Trial._fields
    trials = [Trial(*(int(line[name]) if name == "attentions" else line[name] for name in fields)) for line in lines]
    return trials, lines[0]["transformers"]


def write(trials: list[Trial], path: Path = TABLE) -> None:
    """Write the CSV anew."""
    versions = transformers.__version__, torch.__version__.split("+")[0]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Trial._fields, "transformers", "torch"])
        writer.writerows([*trial, *versions] for trial in trials)


def section(trials: list[Trial], version: str) -> str:
    """The part of the page that is written from the CSV."""
    lines = [f"Transformers {version}.", ""]
    lines += ["| kind | right | of these with images or sound | of these in the cache | refused | not tried |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind in KINDS:
        counts = Counter(trial.result for trial in trials if trial.kind == kind)
        right = [trial for trial in trials if (trial.kind, trial.result) == (kind, RIGHT)]
        media = sum(trial.media != NO_MEDIA for trial in right) or ""
        cached = sum(trial.way == CACHE for trial in right) or ""
        lines.append(f"| {kind} | {len(right)} | {media} | {cached} | {counts[REFUSED]} | {counts[NOT_TRIED]} |")
    for kind in KINDS:
        of_kind = [trial for trial in trials if trial.kind == kind]
        if not of_kind:
            continue
        lines += ["", f"## {kind.capitalize()}", ""]
        for title, way in (("Right", KERNELS), ("Right, with the prefix in the model's cache", CACHE)):
            if names := [f"`{t.model_type}`" for t in of_kind if (t.result, t.way) == (RIGHT, way)]:
                text = f"{title}: {', '.join(names)}."
                lines += [textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False), ""]
        text_alone = [t for t in of_kind if t.result == RIGHT and t.media == NO_MEDIA]
        if "text-to-text" in kind and text_alone:
            names = ", ".join(f"`{trial.model_type}`" for trial in text_alone)
            lines += [textwrap.fill(f"With text alone: {names}.", 120, break_long_words=False), ""]
        lines += ["| model type | result | reason |", "|---|---|---|"]
        for trial in of_kind:
            if trial.result != RIGHT:
                lines.append(f"| `{trial.model_type}` | {trial.result} | {_cell(trial.reason)} |")
    return "\n".join([*lines, *_peft_section(trials)])


def _peft_section(trials: list[Trial]) -> list[str]:
    """PEFT's own prefix tuning beside ours, by kind and by what differs."""
    lines = ["", "## PEFT beside it", ""]
    lines += ["| kind | PEFT trains | of these right here | of these equal after `accelerate` | right here alone |"]
    lines += ["|---|---|---|---|---|"]
    for kind in TASKS:
        of_kind = [trial for trial in trials if trial.kind == kind]
        trained = [trial for trial in of_kind if trial.peft == TRAINS]
        right, equal = (
            sum(x) for x in zip(*[(t.result == RIGHT, t.accelerated == EQUAL) for t in trained], strict=True)
        )
        alone = sum(trial.result == RIGHT and trial.peft != TRAINS for trial in of_kind)
        lines.append(f"| {kind} | {len(trained)} | {right} | {equal} | {alone} |")
    for kind in TASKS:
        of_kind = [trial for trial in trials if trial.kind == kind]
        for title, chosen in (
            ("PEFT trains, refused here", [t for t in of_kind if t.peft == TRAINS and t.result == REFUSED]),
            ("Right here, and PEFT trains the prefixes of some layers alone", _right(of_kind, IN_PART)),
            ("Right here, and PEFT fails", _right(of_kind, FAILS)),
        ):
            if chosen:
                names = ", ".join(f"`{trial.model_type}`" for trial in chosen)
                text = f"{kind.capitalize()}. {title}: {names}."
                lines += ["", textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)]
    refused = [t for t in trials if t.result == RIGHT and t.peft in (TRAINS, IN_PART) and t.accelerated != EQUAL]
    if refused:
        lines += ["", "PEFT trains, right here, and `accelerate` refuses:", ""]
        lines += ["| kind | model type | reason |", "|---|---|---|"]
    lines += [f"| {trial.kind} | `{trial.model_type}` | {_cell(trial.peft_reason)} |" for trial in refused]
    return lines


def _beside_known(trials: list[Trial]) -> list[Trial]:
    """Return the lines of the CSV with those of ``trials`` in their places."""
    known, version = read()
    if version != transformers.__version__:
        sys.exit(f"--type: expected Transformers {version}, with which {TABLE} was written, or a trial of all types")
    new = {(trial.kind, trial.model_type): trial for trial in trials}
    return [new.get((trial.kind, trial.model_type), trial) for trial in known]


def _right(trials: list[Trial], peft: str) -> list[Trial]:
    return [trial for trial in trials if trial.result == RIGHT and trial.peft == peft]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def page(text: str, trials: list[Trial], version: str) -> str:
    """``text`` with that part written anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section(trials, version)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, nargs="*", default=[], help="try these and write nothing")
    parser.add_argument("--type", nargs="*", default=[], help="try these model types of them")
    parser.add_argument("--check", action="store_true", help="fail if the page does not show the CSV")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    if arguments.check:
        text = PAGE.read_text(encoding="utf-8")
        if text != page(text, *read()):
            sys.exit(f"{PAGE}: expected the table of {TABLE}, got another")
        return
    trials = []
    for kind in arguments.kind or KINDS:
        for model_type in model_types(kind):
            if arguments.type and model_type not in arguments.type:
                continue
            trial = try_family(kind, model_type)
            if kind in TASKS and trial.result != NOT_TRIED:
                trial = trial._replace(**try_peft(kind, model_type)._asdict())
            trials.append(trial)
            print(*trials[-1], flush=True)
    if not arguments.kind:
        write(_beside_known(trials) if arguments.type else trials)
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page(text, *read()), encoding="utf-8")
    print(Counter(trial.result for trial in trials))


if __name__ == "__main__":
    main()
