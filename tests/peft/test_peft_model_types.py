"""PEFT's prefix tuning in every model type that it has a task for, and ``accelerate``: as the committed table says."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.compatibility.families import read
from benchmarks.compatibility.family_trial import NOT_TRIED
from benchmarks.compatibility.model_types import tiny_model
from benchmarks.compatibility.peft_trial import EQUAL, FAILS, IN_PART, TASKS, TRAINS, try_peft
from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import save_peft_checkpoint

TRIALS, VERSION = read()
TRIED = [trial for trial in TRIALS if trial.kind in TASKS and trial.result != NOT_TRIED]

pytestmark = pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"written for Transformers {VERSION}")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        pytest.param(trial.kind, trial.model_type, marks=pytest.mark.slow if "classification" in trial.kind else ())
        for trial in TRIED
        if trial.kind != "causal" or trial.peft != FAILS
    ],
)
def test_an_accelerated_model_gives_pefts_results(kind: str, model_type: str) -> None:
    known = next(trial for trial in TRIED if (trial.kind, trial.model_type) == (kind, model_type))
    trial = try_peft(kind, model_type)
    assert (trial.peft, trial.accelerated) == (known.peft, known.accelerated), trial.peft_reason


def test_the_table_knows_pefts_prefix_tuning_of_each_model_type() -> None:
    trained = [trial for trial in TRIED if trial.peft in (TRAINS, IN_PART)]
    assert not [trial for trial in trained if trial.accelerated != EQUAL]
    assert all(trial.peft_reason for trial in TRIED if trial.peft != TRAINS)
    assert sum((trial.kind, trial.peft) == ("causal", TRAINS) for trial in trained) == 124


def test_layers_that_share_keys_in_peft_have_one_prefix_there(tmp_path) -> None:
    model = get_prefix_model(tiny_model("causal", "gemma3n_text"), PrefixTuningConfig(window_includes_prefix=True))
    with pytest.raises(ValueError, match=r"PEFT gives layers \[3, 5, 6, 7, 8\] of this model one prefix, expected"):
        save_peft_checkpoint(model, tmp_path)
