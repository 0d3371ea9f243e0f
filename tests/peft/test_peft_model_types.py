"""Accelerated models of every causal model type that PEFT runs: its results, or a refusal."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

from benchmarks.compatibility.families import read
from benchmarks.compatibility.family_trial import inputs_of
from benchmarks.compatibility.model_types import tiny_model
from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import save_peft_checkpoint

TRIALS, VERSION = read()
# Right with get_prefix_model; PEFT runs them too and accelerate refuses them, with these words.
REFUSED = {
    "gemma3n_text": "takes them from an earlier layer",
    "moshi": "does not say how large its window is",
    "phimoe": "does not say how large its window is",
    "recurrent_gemma": "expected num_layers=1",
}
# PEFT runs no prefix on them.
NOT_PEFTS = {
    *("axk1", "bailing_hybrid", "bamba", "deepseek_v2", "deepseek_v3", "falcon_h1", "glm4_moe_lite"),
    *("granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "lfm3", "mimo_v2_flash", "minicpm3", "minimax"),
    *("nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "youtu", "zamba2", "zaya"),
}
RIGHT = [trial.model_type for trial in TRIALS if (trial.kind, trial.result) == ("causal", "right")]

pytestmark = pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"written for Transformers {VERSION}")


def peft_model(model_type: str) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    return peft.get_peft_model(tiny_model("causal", model_type), config).eval()


@pytest.mark.parametrize("model_type", sorted({*RIGHT} - {*REFUSED, *NOT_PEFTS}))
def test_an_accelerated_model_gives_pefts_logits_and_gradients(model_type: str) -> None:
    theirs = peft_model(model_type)
    ours = accelerate(copy.deepcopy(theirs))
    inputs = inputs_of(theirs.base_model, "right")
    weights = inputs["attention_mask"][..., None]
    logits, grads = [], []
    for model in (theirs, ours):
        logits.append(model(**inputs).logits * weights)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads.append(torch.autograd.grad(logits[-1].square().sum(), trained)[0])
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-3 * grads[0].abs().max().item())


@pytest.mark.parametrize(("model_type", "message"), REFUSED.items())
def test_what_would_not_be_pefts_is_refused(model_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(peft_model(model_type))


def test_layers_that_share_keys_have_no_checkpoint_of_peft(tmp_path) -> None:
    model = get_prefix_model(tiny_model("causal", "gemma3n_text"), PrefixTuningConfig(window_includes_prefix=True))
    with pytest.raises(ValueError, match="takes them from an earlier layer"):
        save_peft_checkpoint(model, tmp_path)
