"""What tests that need a GPU share; on a machine with one they run without the suite's own conftest.py."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent.parent
HELPERS = CHECKOUT / "tests" / "helpers"
if str(HELPERS) not in sys.path:
    sys.path.insert(0, str(HELPERS))
# For build_tools; last, because the package that was built comes before the checkout's folder of its source.
sys.path.append(str(CHECKOUT))

from helpers import nan_filled  # noqa: E402

from prefix_kernels import attention_backend  # noqa: E402

attention_backend("fused")  # for every test that names no other


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    with nan_filled():
        yield
