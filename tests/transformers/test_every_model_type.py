"""A prefix in every model type of Transformers: right as the committed table says, or refused; never silently wrong."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.compatibility.families import PAGE, page, read
from benchmarks.compatibility.family_trial import NO_MEDIA, NOT_TRIED, WRONG, try_family
from benchmarks.compatibility.model_types import KINDS, model_types

TRIALS, VERSION = read()
COMMITTED = {(trial.kind, trial.model_type): trial for trial in TRIALS}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


@pytest.mark.parametrize(
    ("kind", "model_type"), [(kind, model_type) for kind in KINDS for model_type in model_types(kind)]
)
def test_a_prefix_in_this_model_type_is_right_or_refused(kind: str, model_type: str) -> None:
    trial = try_family(kind, model_type)
    assert trial.result != WRONG, trial.reason
    if transformers.__version__ == VERSION:
        known = COMMITTED[kind, model_type]
        expected = (known.result, known.attentions, known.media)
        assert (trial.result, trial.attentions, trial.media) == expected, trial.reason


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text, TRIALS, VERSION)


def test_at_least_230_model_types_are_right_45_with_images_or_sound() -> None:
    right = {trial.model_type for trial in TRIALS if trial.result == "right"}
    assert len(right) >= 230
    assert len({trial.model_type for trial in TRIALS if trial.result == "right" and trial.media != NO_MEDIA}) >= 45
    assert not [trial for trial in TRIALS if trial.result == WRONG]
    assert all(trial.reason for trial in TRIALS if trial.result in ("refused", NOT_TRIED))
