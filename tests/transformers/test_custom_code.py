"""Models of custom code (``trust_remote_code``): by the same rule as those of Transformers, or refused with advice."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils

from benchmarks.compatibility.own_attention import concatenated
from prefix_kernels import replace_multihead_attention
from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model

CODE = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
{imports}

class CottageConfig(PreTrainedConfig):
    model_type = "cottage"
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4


def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class CottageAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, 8, True
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))
        {init}

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        projections = self.q_proj, self.k_proj, self.v_proj
        query, key_states, value_states = (
            projection(hidden_states).unflatten(-1, (4, 8)).transpose(1, 2) for projection in projections
        )
        {forward}


class CottageLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention = CottageAttention(config, layer_idx)

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.attention(hidden_states, **kwargs)


class CottageModel(PreTrainedModel):
    config_class = CottageConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(99, 32)
        self.layers = nn.ModuleList(CottageLayer(config, i) for i in range(2))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, {cache} use_cache=None, **kwargs):
        hidden_states = self.embed(input_ids)
        past = {past}
        mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values=past)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, past_key_values=past, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past)


class CottageForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = CottageConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = CottageModel(config)
        self.lm_head = nn.Linear(32, 99)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, {cache} use_cache=None, logits_to_keep=0, **kwargs):
        out = self.model(input_ids, attention_mask=attention_mask, {hand_on} use_cache=use_cache, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)
"""
WITH_CACHE = {
    "cache": "past_key_values=None,",
    "hand_on": "past_key_values=past_key_values,",
    "past": "DynamicCache() if use_cache and past_key_values is None else past_key_values",
}
WITHOUT_CACHE = {"cache": "", "hand_on": "", "past": "None"}
UPDATE = """if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
        """
BY_INTERFACE = {
    "imports": "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS",
    "init": "",
    "forward": UPDATE
    + """function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = function(
            self, query, key_states, value_states, attention_mask, scaling=8**-0.5, dropout=0.0, **kwargs
        )
        return self.o_proj(out.flatten(2))""",
}
BY_SDPA = {
    "imports": "",
    "init": "",
    "forward": UPDATE
    + """out = F.scaled_dot_product_attention(query, key_states, value_states, attn_mask=attention_mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))""",
}
BY_MODULE = {
    "imports": "",
    "init": "self.inner = nn.MultiheadAttention(32, 4, batch_first=True)",
    "forward": "return self.inner(hidden_states, hidden_states, hidden_states, need_weights=False)[0]",
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write custom code beside a config, and load the model by ``trust_remote_code``."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def build(**parts: str) -> PreTrainedModel:
        folder = tmp_path / f"cottage_{abs(hash(tuple(parts.values())))}"
        folder.mkdir()
        (folder / "modeling.py").write_text(CODE.format(**parts), encoding="utf-8")
        classes = {"AutoConfig": "modeling.CottageConfig", "AutoModelForCausalLM": "modeling.CottageForCausalLM"}
        (folder / "config.json").write_text(json.dumps({"model_type": "cottage", "auto_map": classes}))
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()

    yield build
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def prepared(base: PreTrainedModel) -> PreTrainedModel:
    config = PrefixTuningConfig(num_virtual_tokens=3, init_std=0.5, modules_to_save=())
    return get_prefix_model(copy.deepcopy(base), config)


def text() -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0)), torch.ones(2, 7).long()
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_code_that_goes_through_the_interface_works(load) -> None:
    base = load(**BY_INTERFACE, **WITH_CACHE)
    with pytest.warns(UserWarning, match="CottageForCausalLM takes no position_ids"):
        model = prepared(base)
    pairs = model._prefix_state.tasks.layout.pairs(model.prefix_encoder, model.model)
    modules = [layer.attention for layer in base.model.layers]
    with concatenated(base, {module: [pairs[index]] for index, module in enumerate(modules)}):
        expected = base(**text()).logits
    seen = text()["attention_mask"][..., None]
    torch.testing.assert_close(model(**text()).logits * seen, expected * seen)
    tokens = model.generate(**text(), max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens[:, 7], (expected[:, -1]).argmax(-1))


def test_code_with_attention_of_its_own_and_a_cache_has_its_prefix_there(load) -> None:
    base = load(**BY_SDPA, **WITH_CACHE)
    with pytest.warns(UserWarning, match=r"calls F.scaled_dot_product_attention itself.*lies in the key/value cache"):
        model = prepared(base)
    other = prepared(load(**BY_INTERFACE, **WITH_CACHE))
    other.load_state_dict(model.state_dict())
    seen = text()["attention_mask"][..., None]
    torch.testing.assert_close(model(**text()).logits * seen, other(**text()).logits * seen)


def test_code_that_calls_sdpa_itself_is_refused_with_the_call_that_replaces_it(load) -> None:
    with pytest.raises(
        ValueError, match="CottageAttention calls F.scaled_dot_product_attention itself: .*prefix_attent"
    ):
        prepared(load(**BY_SDPA, **WITHOUT_CACHE))


def test_code_of_torch_modules_is_refused_with_the_function_that_replaces_them(load) -> None:
    base = load(**BY_MODULE, **WITHOUT_CACHE)
    with pytest.raises(ValueError, match=r"torch.nn.MultiheadAttention: .*replace_multihead_attention\(model\)"):
        prepared(base)
    replace_multihead_attention(base, num_prefix_tokens=3)
    assert base(**text()).logits.isfinite().all()
