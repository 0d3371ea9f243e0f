"""README.md and docs/*.md are true: their Python runs as printed, their links, commands and paths lead to what exists,
and their figures of speed are those of the committed CSVs."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

Row = dict[str, str]
CHECKOUT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
RESULTS = CHECKOUT / "benchmarks" / "results"
README = CHECKOUT / "README.md"
DOCS = sorted((CHECKOUT / "docs").glob("*.md"))
PAGES = [README, *DOCS, CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "CHANGELOG.md"]
TOP_FOLDERS = ("benchmarks", "build_tools", "csrc", "docs", "examples", "prefix_kernels", "tests")
MODEL = "bert-base-uncased"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# These pages describe the layout with build_tools/.
after_the_moves = pytest.mark.skipif(not (CHECKOUT / "build_tools").is_dir(), reason="the files have not moved yet")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A folder that takes the place of the hub's model that the pages name."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, max_position_embeddings=64
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / MODEL)
    return tmp_path / MODEL


def run_blocks(page: Path, tiny_bert: Path) -> None:
    source = "\n".join(blocks(page, "python"))
    exec(compile(source.replace(f'"{MODEL}"', repr(str(tiny_bert))), page.name, "exec"), {})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_one_after_another(
    page: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page, tiny_bert)


def test_the_readme_saves_the_task_that_it_speaks_of(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(README, tiny_bert)
    assert (tmp_path / "task.safetensors").is_file()


def test_the_pages_with_code_are_all_run() -> None:
    assert {page.name for page in PAGES if blocks(page, "python")} >= {
        *("README.md", "operator.md", "modules.md", "transformers.md", "peft.md")
    }


# ---- form ------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert 1000 <= len(read(README).split()) <= 1500
    assert read(README).count("\n") <= 200


@each_page
def test_lines_are_short(page: Path) -> None:
    # A row of a table and a command to be copied cannot be broken.
    text = re.sub(r"^```sh\n.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", without_blocks(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_leads_to_every_page() -> None:
    links = re.findall(r"\]\((docs/[^)#]+|[A-Z]+\.md)", read(README))
    assert {CHECKOUT / link for link in links} >= {*DOCS, CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "CHANGELOG.md"}


def test_both_commands_set_up_an_environment_of_their_own() -> None:
    commands = blocks(README, "sh")
    assert [command.count("\n") for command in commands] == [1, 1], "one line each, to be copied"
    for command, last in zip(commands, ["examples/sst2.py", "pytest"], strict=True):
        steps = command.split(" && ")
        assert steps[0] == "python3 -m venv .venv"
        assert all(step.startswith(".venv/bin/python ") for step in steps[1:])
        assert last in steps[-1]


# ---- paths -----------------------------------------------------------------------------------------------------------


@after_the_moves
@each_page
def test_scripts_that_commands_name_exist(page: Path) -> None:
    scripts = re.findall(rf"(?<![\w/])(?:{'|'.join(TOP_FOLDERS)})/[\w/.-]+\.(?:py|sh)\b", read(page))
    assert [script for script in scripts if not (CHECKOUT / script).is_file()] == []


@after_the_moves
@each_page
def test_paths_in_code_quotes_exist(page: Path) -> None:
    quoted = re.findall(rf"`((?:{'|'.join(TOP_FOLDERS)})/[\w/.-]*)`", without_blocks(page))
    assert [path for path in quoted if not (CHECKOUT / path).exists()] == []


def variables_read_by(source: str) -> set[str]:
    """The environment variables that Python or C++ source reads by their names."""
    return set(re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\()["'](\w+)["']""", source))


def test_variables_are_found_in_python_and_in_cpp() -> None:
    source = """os.environ["A"], environ.get('B', ""), std::getenv("C"), environ.items()"""
    assert variables_read_by(source) == {"A", "B", "C"}


def test_the_page_on_installing_names_every_environment_variable() -> None:
    files = [
        path
        for folder in ("build_tools", "csrc", "prefix_kernels")
        for path in (CHECKOUT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
    ]
    read_there = set().union(*(variables_read_by(read(path)) for path in [CHECKOUT / "setup.py", *files]))
    assert {"CXX", "PREFIX_KERNELS_CPU_ISA"} <= read_there
    named = re.findall(r"`(\w+)`", read(CHECKOUT / "docs" / "installing.md"))
    assert sorted(read_there - set(named)) == []


def paths_of_tree(tree: str) -> list[str]:
    """The paths in a tree that is drawn by indenting: a folder ends in a slash; a comment stands two spaces behind."""
    folders: list[tuple[int, str]] = []
    paths = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        names = re.split(r" {2,}", line.strip())[0].split()
        for name in names:
            paths.append("".join(folder for _, folder in folders) + name)
        if len(names) == 1 and names[0].endswith("/"):
            folders.append((indent, names[0]))
    return paths


def test_a_tree_is_read_as_it_is_drawn() -> None:
    tree = "a/          the first\n  b.py c.py  two files\n  d/\n    e/ f/\ng\n"
    assert paths_of_tree(tree) == ["a/", "a/b.py", "a/c.py", "a/d/", "a/d/e/", "a/d/f/", "g"]


@after_the_moves
def test_the_tree_of_the_architecture_page_is_the_checkout() -> None:
    paths = paths_of_tree("\n".join(blocks(CHECKOUT / "docs" / "architecture.md", "text")))
    assert len(paths) > 50
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []
    shown = {path.split("/")[0] for path in paths}
    assert {*TOP_FOLDERS, "README.md"} <= shown


# ---- figures ---------------------------------------------------------------------------------------------------------

PASSES = {
    "forward": "forward",
    "backward": "whole backward",
    "prefix_backward": "prefix-only backward",
    "decode": "decode, one query",
    "forward_backward": "forward and backward, dropout 0.1, padding",
}


def rows_of(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def spread(rows: list[Row], column: str) -> str:
    values = [float(row[column]) for row in rows if row[column]]
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def speed_table(name: str, columns: tuple[str, ...]) -> list[str]:
    rows, lines = rows_of(name), []
    for pass_, title in PASSES.items():
        for causal in "01":
            chosen = [row for row in rows if row["pass"] == pass_ and row["causal"] == causal]
            if chosen:
                cells = [title, ("no", "yes")[int(causal)], *(spread(chosen, column) for column in columns)]
                lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return lines


def training_step_table() -> list[str]:
    rows, lines = rows_of("training_step_cpu"), []
    for cell in dict.fromkeys((row["batch"], row["length"], row["checkpointing"]) for row in rows):
        cells = [f"{cell[0]}, {cell[1]}{', activation checkpointing' if cell[2] == '1' else ''}"]
        for row in rows:
            if (row["batch"], row["length"], row["checkpointing"]) != cell:
                continue
            if row["refusal"]:
                # What this package raises is a ValueError that says what does not fit.
                cells.append("refuses" if row["contender"] == "accelerated_peft" else "fails")
            elif row["contender"] == "prefix_kernels":
                cells.append(f"{float(row['step_ms']):.0f} ms, {float(row['peak_mib']):.0f} MiB")
            else:
                cells.append(f"{float(row['step_ratio']):.2f}x, {float(row['peak_mib']):.0f} MiB")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def instruction_table() -> list[str]:
    rows = rows_of("instructions_avx2")

    def line(title: str, passes: tuple[str, ...], chosen: Callable[[Row], bool]) -> str:
        values = [float(row["all"]) for row in rows if row["pass"] in passes and chosen(row)]
        return f"| {title} | {min(values):.1f} to {max(values):.1f} |"

    plain, prefix = ("forward", "backward"), ("prefix_backward",)
    return [
        line("forward and whole backward, not causal", plain, lambda row: row["causal"] == "0"),
        line(
            "forward and whole backward, causal, S = 64 and 128",
            plain,
            lambda row: row["causal"] == "1" and row["q_len"] in ("64", "128"),
        ),
        line("prefix-only backward, P = 20", prefix, lambda row: row["prefix_len"] == "20"),
        line("prefix-only backward, P = 64", prefix, lambda row: row["prefix_len"] == "64"),
        line(PASSES["forward_backward"], ("forward_backward",), lambda row: True),
    ]


WHOLE = ("cat_ratio", "alternative_ratio", "of_floor")
TABLES = {
    "float32": partial(speed_table, "attention_cpu_float32", WHOLE),
    "bfloat16": partial(speed_table, "attention_cpu_bfloat16", WHOLE),
    "backends, float32": partial(speed_table, "backends_cpu_avx2_float32", ("split_ratio", "cat_ratio")),
    "backends, bfloat16": partial(speed_table, "backends_cpu_avx2_bfloat16", ("split_ratio", "cat_ratio")),
    "Zen 4": partial(speed_table, "attention_cpu_float32_zen4", ("cat_sdpa_ratio",)),
    "training step": training_step_table,
    "instructions": instruction_table,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_benchmarks_page_shows_what_was_measured(name: str) -> None:
    expected = "\n".join(TABLES[name]())
    assert f"|\n{expected}\n\n" in read(CHECKOUT / "docs" / "benchmarks.md"), f"expected the table\n{expected}"


def test_the_headline_ratios_of_the_readme_were_measured() -> None:
    steps = {
        (row["batch"], row["length"], row["contender"]): row
        for row in rows_of("training_step_cpu")
        if row["checkpointing"] == "0"
    }

    def times_less_memory(batch: str, length: str) -> float:
        ours, peft = (float(steps[batch, length, name]["peak_mib"]) for name in ("prefix_kernels", "peft"))
        return peft / ours

    def times_faster(batch: str, length: str) -> float:
        return float(steps[batch, length, "peft"]["step_ratio"])

    attention = [row for row in rows_of("attention_cpu_float32") if row["causal"] == "0"]
    forward, prefix = (
        spread([row for row in attention if row["pass"] == pass_], "cat_ratio").replace(" (", "x faster (")
        for pass_ in ("forward", "prefix_backward")
    )
    shapes = (("16", "128"), ("4", "492"))
    less = " and ".join(f"{times_less_memory(*shape):.2f}x" for shape in shapes)
    for line in (
        *(
            f"| time of a training step of BERT, B = {batch}, S = {length} | PEFT | "
            f"{times_faster(batch, length):.2f}x faster |"
            for batch, length in shapes
        ),
        f"| peak memory of the same two steps | PEFT | {less} less |",
        f"| forward pass of attention, 11 shapes | `torch.cat` + SDPA | {forward} |",
        f"| backward pass for the prefix alone, 11 shapes | `torch.cat` + SDPA | {prefix} |",
    ):
        assert line in read(README), line
    claim = " ".join(read(README).split())
    low, high = (f"{times_faster(*shape):.1f}" for shape in shapes)
    assert f"is {low} to {high} times faster than with PEFT" in claim
    low, high = (f"{times_less_memory(*shape):.1f}" for shape in shapes)
    assert f"and takes {low} to {high} times less memory" in claim
