"""The source files as a whole: their size, and what tests may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent.parent
FOLDERS = ("benchmarks", "build_tools", "csrc", "examples", "prefix_kernels", "tests")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
SOURCES = [path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*") if path.suffix in SUFFIXES]
TESTS = sorted((CHECKOUT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def test_a_file_has_at_most_500_lines() -> None:
    lines = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert len(lines) > 300
    assert {name: count for name, count in lines.items() if count > 500} == {}


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_imports_a_test(path: Path) -> None:
    """Shared code is in tests/helpers, so that a test runs alone and may move."""
    modules = {
        name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {name for name in modules if name.split(".")[-1].startswith("test_")} == set()
