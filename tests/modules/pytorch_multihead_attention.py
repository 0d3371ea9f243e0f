"""Runs PyTorch's own tests of ``nn.MultiheadAttention`` on the drop-in; compares the failures with those documented.

    python tests/modules/pytorch_multihead_attention.py PYTORCH/test

``PYTORCH/test`` is the folder of tests in a source release of the installed PyTorch; its tests need the package
``expecttest``. Each file runs twice, with ``nn.MultiheadAttention`` itself and with ``PrefixMultiheadAttention`` in its
place (no prefix tokens, so that it computes the same function), also inside ``nn.TransformerEncoderLayer`` and its
relatives. Tests that fail for both, or are skipped, say nothing of the drop-in. Exit status 1: the drop-in fails a test
that is not among DIFFERENCES, or passes one that is. The differences are explained in docs/modules.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Files of PyTorch's tests, and which tests in them use the module (pytest's -k).
FILES = {
    "nn/test_multihead_attention.py": "",
    "test_native_mha.py": "",
    "test_modules.py": "MultiheadAttention",
}
# Tests that the drop-in fails: a pattern of their names, and the documented difference.
_ERRORS = "shapes that do not fit raise a ValueError of this package's own words"
_FUSED = "there is no fused inference path"
DIFFERENCES = {
    r"test_multihead_attn_invalid_shape$": _ERRORS,
    r"test_multihead_attn_fast_path_invalid_shape$": _ERRORS,
    r"test_multihead_attn_nested_tensor_outside_fast_path$": _ERRORS,
    r"fast_path_query_and_bias_have_different_dtypes": _FUSED,
    r"test_multihead_self_attn_two_masks_fast_path_mock": _FUSED,
    r"test_gradgrad_nn_MultiheadAttention": "double backward is refused",
}
_DROP_IN = "PREFIX_KERNELS_DROP_IN"


class _Record:
    """A pytest plugin that notes the outcome of every test by its name."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[_plain_name(report.nodeid)] = report.outcome


def _plain_name(node_id: str) -> str:
    """The name of a test without its folder, the same whichever of the two classes it ran on."""
    return node_id.split("/")[-1].replace("PrefixMultiheadAttention", "MultiheadAttention")


def _swap_in() -> None:
    """Put the drop-in in the place of ``nn.MultiheadAttention``, before PyTorch's tests are imported."""
    import torch.nn.modules.activation
    import torch.nn.modules.transformer

    from prefix_kernels import PrefixMultiheadAttention

    for module in (torch.nn, torch.nn.modules, torch.nn.modules.activation, torch.nn.modules.transformer):
        module.MultiheadAttention = PrefixMultiheadAttention


def _run(file: Path, selected: str, outcomes: Path) -> None:
    """Run one file of PyTorch's tests in this process."""
    if os.environ.get(_DROP_IN):
        _swap_in()
    record = _Record()
    options = ["-q", "--no-header", "--tb=short", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull]
    pytest.main([*options, f"--rootdir={file.parent}", *(["-k", selected] if selected else []), str(file)], [record])
    outcomes.write_text(json.dumps(record.outcomes))


def outcomes_of(file: Path, selected: str, *, drop_in: bool) -> dict[str, str]:
    """The outcome of each test of a file by name, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        environment = os.environ | {_DROP_IN: "1" if drop_in else "", "PYTORCH_TESTING_DEVICE_ONLY_FOR": "cpu"}
        command = [sys.executable, __file__, "--one", str(file), selected, str(outcomes)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not outcomes.is_file():
            raise RuntimeError(f"{file}: its tests did not run:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
        if drop_in:
            sys.stdout.write(run.stdout)
        return json.loads(outcomes.read_text())


def compare(plain: dict[str, str], drop_in: dict[str, str]) -> list[str]:
    """List the failures of the drop-in that are not documented, and the documented ones that pass."""
    problems = []
    for name, outcome in plain.items():
        if outcome != "passed":
            continue
        difference = next((text for pattern, text in DIFFERENCES.items() if re.search(pattern, name)), None)
        got = drop_in.get(name, "missing")
        if got != "passed" and difference is None:
            problems.append(f"{name}: {got}, and no documented difference says why")
        if got == "passed" and difference is not None:
            problems.append(f"{name}: passed, where a difference is documented: {difference}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder `test` of PyTorch's source release")
    folder = parser.parse_args().folder
    problems, count = [], 0
    for name, selected in FILES.items():
        if not (folder / name).is_file():
            parser.error(f"folder: expected PyTorch's folder `test` with {name} in it, got {folder}")
        plain, drop_in = (outcomes_of(folder / name, selected, drop_in=each) for each in (False, True))
        passed = sum(outcome == "passed" for outcome in plain.values())
        print(f"{name}: nn.MultiheadAttention passes {passed} of {len(plain)}")
        problems += compare(plain, drop_in)
        count += passed
    print("\n".join([*problems, f"{count} tests, {len(problems)} undocumented differences"]))
    return 1 if problems else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _run(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        sys.exit(main())
