"""The benchmarks as a folder: what their README lists exists, scripts find the package, and no one imports a script."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent.parent
BENCHMARKS = CHECKOUT / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
MODULES = sorted(BENCHMARKS.rglob("*.py"))
SCRIPTS = [path for path in MODULES if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]


def name_of(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def imports_of(path: Path) -> set[str]:
    """Full names of all modules, and of all names in modules, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_readme_has_a_command_for_every_script_and_no_other() -> None:
    commands = set(re.findall(r"benchmarks/[\w/]+\.(?:py|sh)", README))
    assert commands == {name_of(path) for path in [*SCRIPTS, BENCHMARKS / "run_on_gpu.sh"]}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_benchmark_imports_a_script(path: Path) -> None:
    scripts = {name_of(script).removesuffix(".py").replace("/", ".") for script in SCRIPTS}
    assert imports_of(path).isdisjoint(scripts)


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_appends_the_checkout_to_the_path(path: Path) -> None:
    line = r"^sys\.path\.append\(str\(Path\(__file__\)\.parents\[(\d)\]\)\)$"
    (up,) = re.findall(line, path.read_text(encoding="utf-8"), re.MULTILINE)
    assert path.parents[int(up)] == CHECKOUT


def test_no_module_hides_a_library_from_the_scripts_beside_it() -> None:
    """The folder of a script comes first on its path."""
    assert not {path.stem for path in MODULES} & {*sys.stdlib_module_names, "torch", "transformers", "peft", "adapters"}
