"""Tests that need a GPU, and what they compile."""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent
for folder in (CHECKOUT / "tests", CHECKOUT / "csrc"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
