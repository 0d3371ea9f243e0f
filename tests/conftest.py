"""Settings of the whole suite; they must be made before torch starts its thread pool."""

import os

# Waiting threads must not spin: pytest-xdist runs one process per core, each with a pool of its own.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import hypothesis
import pytest
import torch

TESTS = Path(__file__).parent
CHECKOUT = TESTS.parent

# `python -m pytest` puts the current folder first on the path, where the unbuilt package hides the installed one;
# so does every Python that a test starts there.
elsewhere = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != CHECKOUT]
if PathFinder.find_spec("prefix_kernels", elsewhere):
    sys.path[:] = elsewhere
    os.environ["PYTHONSAFEPATH"] = "1"

# pytest puts this folder on the path, where its `transformers` and `peft` would stand for packages not installed.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != TESTS]
sys.path.insert(0, str(TESTS / "helpers"))

# The benchmarks are tested as the package `benchmarks`. The checkout comes last, behind the installed prefix_kernels.
sys.path.append(str(CHECKOUT))

hypothesis.settings.register_profile(
    "ci",
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "explore", max_examples=3000, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fused_kernels() -> Iterator[None]:
    """Tests that speak of no backend test the kernels of the package, whatever `auto` takes on this processor."""
    # Not at the top: the package must be found as arranged above.
    from prefix_kernels import attention_backend

    with attention_backend("fused"):
        yield


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    from helpers import nan_filled  # which imports the package too

    with nan_filled():
        yield
