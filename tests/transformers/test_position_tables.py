"""Decoders whose tables of positions number them by themselves: rows begin behind their own prefixes there too."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.compatibility.family_trial import inputs_of
from benchmarks.compatibility.model_types import tiny_model
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_named_prefix,
    save_prefix_model,
)
from prefix_kernels.integrations.transformers.hooks.decoder_positions import PositionTableShift, _CurrentShift

TYPES = ("m2m_100", "nllb-moe", "pegasus_x")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


def _prepared(base: PreTrainedModel, length: int) -> PreTrainedModel:
    torch.manual_seed(length)
    config = PrefixTuningConfig(
        num_virtual_tokens=length, init_std=0.5, target_attentions=("decoder",), position_offset="peft"
    )
    return get_prefix_model(copy.deepcopy(base), config)


@pytest.mark.parametrize("model_type", TYPES)
def test_rows_with_prefixes_of_different_lengths_have_their_own_positions(model_type: str, tmp_path: Path) -> None:
    base = tiny_model("seq2seq", model_type)
    alone = {"long": _prepared(base, 6), "short": _prepared(base, 2), None: base}
    model = _prepared(base, 4)
    for name in ("long", "short"):
        save_prefix_model(alone[name], tmp_path / f"{name}.safetensors")
        load_named_prefix(model, name, tmp_path / f"{name}.safetensors")
    rows = {name: tensor[:1].expand(3, *tensor.shape[1:]) for name, tensor in inputs_of(base, "right").items()}
    names = ["long", None, "short"]
    with torch.no_grad():
        logits = model(**rows, prefix_names=names).logits
        for row, name in enumerate(names):
            expected = alone[name](**{key: tensor[:1] for key, tensor in rows.items()}).logits[0]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_embeddings_of_tokens_move_as_the_tokens_do(model_type: str) -> None:
    base = tiny_model("seq2seq", model_type)
    model = _prepared(base, 4)
    inputs = inputs_of(base, "none")
    tokens = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=tokens).logits
        embeddings = model.get_decoder().embed_tokens(tokens)
        actual = model(**inputs, decoder_inputs_embeds=embeddings).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_table_that_cannot_be_told_positions_is_refused() -> None:
    class Table(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    class Decoder:
        current = _CurrentShift()

    with pytest.raises(RuntimeError, match=r"Table: expected an argument position_ids, .*got \['input_ids'\]"):
        PositionTableShift(Table(), Decoder())(Table(), (torch.zeros(1, 3),), {})
