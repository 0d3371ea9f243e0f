"""The checks of the CUDA kernels can fail: every bug of tests/emulator/planted_bugs.py is caught."""

import subprocess
import sys

import emulated
import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_planted_bug_is_caught() -> None:
    script = emulated.EMULATOR / "mutations.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    count, _, caught = run.stdout.splitlines()[-1].split()[:3]
    assert count == caught and int(count) >= 25, run.stdout
