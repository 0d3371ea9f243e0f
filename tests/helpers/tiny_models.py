"""Tiny random models of text of every family that PEFT runs too, their inputs, and their prefixes."""

from __future__ import annotations

import copy

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model

P, LAYERS, VOCABULARY = 5, 2, 99
ONE_OF_EACH = ("bert", "roberta", "gpt2", "llama")
PAD = {"roberta": 1, "xlm-roberta": 1, "camembert": 1}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tiny_model(
    family: str, auto_class: type = AutoModelForSequenceClassification, **settings: object
) -> PreTrainedModel:
    """A random model whose weights are large enough for every gradient to matter, in eval mode."""
    sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD.get(family, 0), "bos_token_id": 97, "eos_token_id": 98}
    if family == "llama":
        sizes["num_key_value_heads"] = 2
    settings = {"max_position_embeddings": 64, "initializer_range": 0.3, "num_labels": 3} | settings
    return auto_class.from_config(AutoConfig.for_model(family, **sizes, **tokens, **settings)).eval()


def batch(family: str, padding: str = "none") -> dict[str, Tensor]:
    """Three rows of up to seven tokens; with ``padding`` the second has five and the third three."""
    input_ids = torch.randint(3, 97, (3, 7))
    if padding == "none":
        return {"input_ids": input_ids}
    attention_mask = torch.ones_like(input_ids)
    for row, absent in enumerate([0, 2, 4]):
        where = slice(7 - absent, 7) if padding == "right" else slice(0, absent)
        attention_mask[row, where] = 0
        input_ids[row, where] = PAD.get(family, 0)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def with_peft(base: PreTrainedModel, ours: PreTrainedModel, task_type: str = "SEQ_CLS") -> peft.PeftModel:
    """PEFT's prefix tuning of the same model with the same prefix."""
    config = peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=P)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(ours.prefix_encoder.table.flatten(1))
    return theirs


def prepared(base: PreTrainedModel, **settings: object) -> PreTrainedModel:
    return get_prefix_model(copy.deepcopy(base), PrefixTuningConfig(**({"num_virtual_tokens": P} | settings)))


LABELS = torch.tensor([0, 1, 2])


class Sentences(torch.utils.data.Dataset):
    def __init__(self, family: str) -> None:
        inputs = batch(family, "right")
        self.rows = [{name: t[i] for name, t in inputs.items()} | {"labels": LABELS[i]} for i in range(3)] * 2

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def t5_with_a_deep_decoder() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    config = transformers.T5Config(vocab_size=99, decoder_start_token_id=0, initializer_factor=3.0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


def bart_with_large_weights() -> PreTrainedModel:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(vocab_size=99, max_position_embeddings=64, init_std=0.3, **sizes, **heads)
    return transformers.BartForConditionalGeneration(config).eval()
