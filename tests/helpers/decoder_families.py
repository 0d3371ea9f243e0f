"""The decoders of text as `Family`s: tiny random models, their inputs and labels."""

from __future__ import annotations

import functools

import torch
from family_checks import Family, text_batch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LENGTH, WINDOW = 9, 4
PAD, FIRST_TOKEN, VOCABULARY = 0, 3, 99


def tiny(model_type: str, settings: dict[str, object], **more: object) -> PreTrainedModel:
    """A random model whose weights are large enough for every gradient to matter, in eval mode."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    # With a head of its own a random model does not repeat its last token.
    tokens = {
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    others = {"max_position_embeddings": 64, "initializer_range": 0.3, "attention_dropout": 0.1}
    config = AutoConfig.for_model(model_type, **(sizes | tokens | others | settings | more))
    model = AutoModelForCausalLM.from_config(config).eval()
    # Transformers does not know it of a GPT2LMHeadModel, and says so where a compiled model cannot.
    model.loss_type = "ForCausalLM"
    return model


batch = functools.partial(text_batch, end=VOCABULARY)


def labels(inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    # What comes first is predicted by padding on its left, where no model's output means anything.
    first = mask.cumsum(1) == 1
    return inputs["input_ids"].masked_fill((mask == 0) | first, -100)


def family(name: str, **settings: object) -> Family:
    model = functools.partial(tiny, name, settings)
    return Family(name, model, batch, labels, peft_task="CAUSAL_LM", learning_rate=0.3)


GROUPED = {"num_key_value_heads": 2}
# One layer of each kind.
MIXED = GROUPED | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = [
    family("gpt2", attn_pdrop=0.1),
    family("gpt_neox"),
    family("opt", ffn_dim=48, word_embed_proj_dim=32, init_std=0.3, dropout=0.0),
    family("llama", **GROUPED),
    family("mistral", sliding_window=WINDOW, **GROUPED),
    family("qwen2", use_sliding_window=True, **MIXED),
    family("qwen3", use_sliding_window=True, head_dim=8, **MIXED),
    # PEFT runs the model's own attention, of which only this one has the softcap.
    family("gemma2", head_dim=8, attn_logit_softcapping=3.0, attn_implementation="eager", **MIXED),
    family("gemma3_text", head_dim=8, **MIXED),
    family("phi", qk_layernorm=True, **GROUPED),
    family("phi3", sliding_window=WINDOW, initializer_range=0.2, **GROUPED),
]
MIXED_FAMILIES = ("qwen2", "qwen3", "gemma2", "gemma3_text")
SLIDING = [one for one in FAMILIES if one.name in (*MIXED_FAMILIES, "mistral", "phi3")]
