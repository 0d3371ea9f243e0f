"""The table of docs/compatibility.md: every row of this package works, and the page shows what the CSV records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compatibility.libraries import LIBRARIES
from benchmarks.compatibility.probes import ROWS, Row
from benchmarks.compatibility.trials import (
    BEGIN,
    END,
    PAGE,
    TABLE,
    Result,
    attempt,
    markdown,
    read,
    versions,
    with_table,
)
from benchmarks.compatibility.what_works import main

CHECKOUT = Path(__file__).parent.parent.parent
TRIALS = [(row.want, model) for row in ROWS for model in row.models]
# To let PEFT train, compile and generate again would cost more than it tells.
CHEAP = [row for row in ROWS if not {"torch.compile", "Trainer", "generate"} & set(row.want.replace("`", " ").split())]


def each(rows: list[Row]) -> pytest.MarkDecorator:
    trials = [(row, model) for row in rows for model in row.models]
    return pytest.mark.parametrize(("row", "model"), trials, ids=[f"{row.want}-{model}" for row, model in trials])


@pytest.fixture(scope="module")
def recorded() -> list[Result]:
    return read(TABLE)


@each(ROWS)
def test_what_the_table_says_of_ours_works(row: Row, model: str) -> None:
    for package in row.needs:
        pytest.importorskip(package)
    row.probe(LIBRARIES["prefix_kernels"], model)


def test_the_table_says_that_every_row_of_ours_works(recorded: list[Result]) -> None:
    ours = [result for result in recorded if result.library == "prefix_kernels"]
    assert [(result.want, result.model) for result in ours] == TRIALS
    assert {result.works for result in ours} == {"yes"}
    assert {result.version for result in ours} == {versions(LIBRARIES["prefix_kernels"])[0]}


def test_every_library_was_tried_at_every_row_and_every_failure_has_a_message(recorded: list[Result]) -> None:
    assert {result.library for result in recorded} == set(LIBRARIES)
    for run in {result.run for result in recorded}:
        assert [(result.want, result.model) for result in recorded if result.run == run] == TRIALS, run
    for result in recorded:
        assert (result.works, bool(result.seen)) in {("yes", False), ("no", True)}, result


def test_the_page_shows_the_table_that_is_recorded(recorded: list[Result]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"\n\n{markdown(recorded)}\n\n" in page
    assert page == with_table(page, recorded), "run what_works.py without arguments"


def test_the_script_writes_the_page_and_tells_a_stale_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[Result]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nan old table\n{END}\n\nafter\n")
    monkeypatch.setattr(sys, "argv", ["what_works.py", "--page", str(page), "--check"])
    with pytest.raises(SystemExit, match="expected the table of"):
        main()
    assert "an old table" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["what_works.py", "--page", str(page)])
    main()
    assert page.read_text() == f"before\n\n{BEGIN}\n\n{markdown(recorded)}\n\n{END}\n\nafter\n"
    monkeypatch.setattr(sys, "argv", ["what_works.py", "--page", str(page), "--check"])
    main()


def test_a_page_without_a_place_for_the_table_is_refused(recorded: list[Result]) -> None:
    with pytest.raises(ValueError, match="page: expected the lines"):
        with_table("no table here\n", recorded)


def test_a_cell_says_yes_or_no_or_names_the_models_that_work() -> None:
    run = ("peft", "1.0", "5.0", "2.0")
    works = {"BERT": "no", "GPT-2": "yes"}
    results = [Result(row.want, model, *run, works.get(model, "yes"), "") for row in ROWS for model in row.models]
    lines = {line.split(" | ")[0].strip("| "): line for line in markdown(results).splitlines()}
    assert lines["use every position that the model has: BERT, GPT-2"].endswith(" | GPT-2 |")
    assert lines["train on images: ViT, DeiT, CLIP"].endswith(" | yes |")
    none = [result._replace(works="no") for result in results]
    assert markdown(none).splitlines()[-1].endswith(" | no |")


def test_a_failure_is_recorded_with_the_ends_of_its_message() -> None:
    def probe(library: object, model: str) -> None:
        raise ValueError(f"not\n  with {model}{' again' * 100}")

    result = attempt(Row("a want", probe, ("BERT",)), "BERT", LIBRARIES["prefix_kernels"])
    assert result.works == "no"
    assert result.seen.startswith("ValueError: not with BERT again") and result.seen.endswith(" again again")
    assert len(result.seen) < 520


@pytest.mark.parametrize("name", ["accelerated_peft", "peft"])
@each(CHEAP)
def test_peft_does_what_the_table_says(row: Row, model: str, name: str, recorded: list[Result]) -> None:
    for package in ("peft", *row.needs):
        pytest.importorskip(package)
    version, base, _ = versions(LIBRARIES[name])
    of_this_run = [result for result in recorded if result.run == (name, version, base)]
    if not of_this_run:
        pytest.skip(f"the table has nothing of PEFT {version} with Transformers {base}")
    (expected,) = [result for result in of_this_run if (result.want, result.model) == (row.want, model)]
    assert attempt(row, model, LIBRARIES[name]).works == expected.works


def test_the_other_libraries_are_tried_without_this_package() -> None:
    source = "import sys; sys.modules['prefix_kernels'] = None; import benchmarks.compatibility.what_works"
    subprocess.run([sys.executable, "-c", source], check=True, cwd=CHECKOUT, env={"PYTHONPATH": "."})
