"""PEFT's prefix tuning in every model type that it has a task for, and ``accelerate``: as the committed table says."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.compatibility.families import read
from benchmarks.compatibility.family_trial import NOT_TRIED
from benchmarks.compatibility.model_types import tiny_model
from benchmarks.compatibility.peft_trial import DIFFERS, EQUAL, FAILS, TASKS, TRAINS, peft_model, try_peft
from prefix_kernels.integrations.peft import accelerate
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
def test_an_accelerated_model_gives_pefts_results_or_is_refused(kind: str, model_type: str) -> None:
    known = next(trial for trial in TRIED if (trial.kind, trial.model_type) == (kind, model_type))
    trial = try_peft(kind, model_type)
    assert (trial.peft, trial.accelerated) == (known.peft, known.accelerated), trial.peft_reason


def test_the_table_knows_pefts_prefix_tuning_of_each_model_type() -> None:
    assert not [trial for trial in TRIED if trial.accelerated == DIFFERS]
    assert all(trial.peft_reason for trial in TRIED if (trial.peft, trial.accelerated) != (TRAINS, EQUAL))
    trained = [trial for trial in TRIED if (trial.kind, trial.peft) == ("causal", TRAINS)]
    assert sum(trial.accelerated == EQUAL for trial in trained) >= 101


@pytest.mark.parametrize(
    ("model_type", "message"),
    {
        "gemma3n_text": "takes them from an earlier layer",
        "phimoe": "does not say how large its window is",
        "recurrent_gemma": "expected num_layers=1",
    }.items(),
)
def test_what_would_not_be_pefts_is_refused(model_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(peft_model("causal", model_type))


def test_layers_that_share_keys_have_no_checkpoint_of_peft(tmp_path) -> None:
    model = get_prefix_model(tiny_model("causal", "gemma3n_text"), PrefixTuningConfig(window_includes_prefix=True))
    with pytest.raises(ValueError, match="takes them from an earlier layer"):
        save_peft_checkpoint(model, tmp_path)
