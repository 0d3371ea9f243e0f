"""What tests that need a GPU share; on a machine with one they run without the suite's own conftest.py."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent.parent
for folder in (CHECKOUT / "tests", CHECKOUT / "csrc"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from helpers import nan_filled  # noqa: E402


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    with nan_filled():
        yield
