"""A prefix in the usual model types is right, whichever supported version of Transformers is installed.

CI runs this with the oldest and the newest; :mod:`test_every_model_type` covers the version of the committed table.
"""

from __future__ import annotations

import pytest
import transformers

from benchmarks.compatibility.family_trial import RIGHT, try_family
from benchmarks.compatibility.model_types import model_types

COMMON = {
    "causal": (
        *("bart", "bloom", "cohere2", "deepseek_v3", "ernie4_5", "falcon", "falcon_h1", "gemma", "gemma2"),
        *("gemma3_text", "gemma4_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj"),
        *("granite", "jamba"),
        *("llama", "llama4_text", "minicpm3", "mistral", "mixtral", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2"),
        *("qwen3", "qwen3_moe", "qwen3_next", "smollm3", "starcoder2"),
    ),
    "masked": ("bert", "roberta", "modernbert", "distilbert"),
    "seq2seq": ("t5", "umt5", "bart", "m2m_100"),
    "image classification": ("vit", "dinov2"),
    "image-text-to-text": ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma", "idefics3", "internvl"),
    "speech seq2seq": ("whisper",),
    "audio classification": ("wav2vec2",),
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "model_type"), [(kind, name) for kind, names in COMMON.items() for name in names])
def test_a_prefix_in_this_common_model_type_is_right(kind: str, model_type: str) -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    assert model_type in model_types(kind)
    trial = try_family(kind, model_type)
    assert trial.result == RIGHT, trial.reason
