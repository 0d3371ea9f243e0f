"""Whisper on speech that is longer than its encoder takes at once: by segments, and rows that are done drop out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from eager_prefix import eager_prefix
from encoder_decoder_families import END, MELS, START, WHISPER, tiny_whisper
from family_checks import prepared
from torch import Tensor
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers import (
    load_named_prefix,
    load_prefix_model,
    save_prefix_model,
    use_prefixes,
)
from prefix_kernels.integrations.transformers.structure.attention_sites import find_sites
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout

NO_TIMESTAMPS, TIMESTAMPS = 100, 1501
SEGMENT = 3000  # frames, 30 seconds


@pytest.fixture
def base() -> PreTrainedModel:
    """A tiny model that transcribes with timestamps; its tokens differ with what it hears."""
    torch.manual_seed(0)
    sizes = {"vocab_size": NO_TIMESTAMPS + 1 + TIMESTAMPS, "max_source_positions": SEGMENT // 2}
    model = tiny_whisper(max_target_positions=64, init_std=0.4, **sizes)
    config = model.generation_config
    config.no_timestamps_token_id, config.is_multilingual, config.max_initial_timestamp_index = NO_TIMESTAMPS, False, 50
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id, config.max_length = START, END, END, 64
    return model


def speech(*frames: int) -> dict[str, Tensor]:
    """So many frames of noise in each row."""
    mask = torch.stack([torch.arange(max(frames)) < length for length in frames]).long()
    return {"input_features": torch.randn(len(frames), MELS, max(frames)), "attention_mask": mask}


def transcribe(model: PreTrainedModel, inputs: dict[str, Tensor], **settings: object) -> Tensor:
    settings = {"return_timestamps": True, "do_sample": False, "max_new_tokens": 12} | settings
    return model.generate(**inputs, **settings)


@pytest.mark.parametrize("beams", [1, 2])
def test_tokens_are_those_of_the_eager_model(base: PreTrainedModel, beams: int) -> None:
    model = prepared(WHISPER, base, position_offset="none")
    inputs = speech(5000, 3500)
    layout = PrefixLayout(find_sites(base), model.prefix_tuning_config)
    pairs = [pair for stack in layout.stacks for pair in layout.pairs(model.prefix_encoder, stack).items()]
    tokens = transcribe(model, inputs, num_beams=beams)
    with eager_prefix(base, {layout.sites[site].module: [pair] for site, pair in pairs}):
        expected = transcribe(base, inputs, num_beams=beams)
    assert torch.equal(tokens, expected)
    assert len(tokens.unique()) > 10, "a model that repeats one token would hide mistakes"
    assert not torch.equal(tokens, transcribe(base, inputs, num_beams=beams))


def test_tokens_are_those_of_full_recomputation(base: PreTrainedModel) -> None:
    model, inputs = prepared(WHISPER, base), speech(5000, 3500)
    for settings in ({}, {"condition_on_prev_tokens": True}):
        tokens = transcribe(model, inputs, **settings)
        assert torch.equal(transcribe(model, inputs, **settings, use_cache=False), tokens)


@pytest.fixture
def two_tasks(base: PreTrainedModel, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with the tasks "default" and "other", of the decoder alone, and one with "other" alone."""
    settings = {"target_attentions": ["decoder"]}
    other = prepared(WHISPER, base, num_virtual_tokens=3, **settings)
    save_prefix_model(other, tmp_path / "other")
    save_prefix_model(prepared(WHISPER, base, **settings), tmp_path / "default")
    model = load_prefix_model(copy.deepcopy(base), tmp_path / "default")
    load_named_prefix(model, "other", tmp_path / "other")
    return model, other


def test_rows_that_drop_out_leave_their_task_to_the_others(
    two_tasks: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, other = two_tasks
    inputs = speech(3200, 9000, 5000)
    expected = transcribe(other, inputs)
    assert torch.equal(transcribe(model, inputs, prefix_names=["other"] * 3), expected)
    with use_prefixes(model, ["other"] * 3):
        assert torch.equal(transcribe(model, inputs), expected)


@pytest.mark.parametrize(
    ("frames", "settings"),
    [
        ((3200, 9000), {}),
        # Two rows of beams, which are as many as there are names, when one of two is done.
        ((3200, 9000), {"num_beams": 2}),
        ((SEGMENT, SEGMENT), {"temperature": (0.0, 0.5), "logprob_threshold": 0.0}),
    ],
    ids=["long", "beams", "temperatures"],
)
def test_rows_of_different_tasks_that_may_drop_out_are_refused(
    two_tasks: tuple[PreTrainedModel, PreTrainedModel], frames: tuple[int, ...], settings: dict[str, object]
) -> None:
    model, inputs = two_tasks[0], speech(*frames)
    message = "prefix_names: expected the same for all rows where generate goes on with some of them"
    with pytest.raises(ValueError, match=message):
        transcribe(model, inputs, **settings, prefix_names=["other", None])
    with use_prefixes(model, ["other", "default"]), pytest.raises(ValueError, match=message):
        transcribe(model, inputs, **settings)


def test_rows_of_one_segment_each_see_their_own_task(two_tasks: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, other = two_tasks
    inputs = speech(SEGMENT, SEGMENT)
    tokens = transcribe(model, inputs, prefix_names=["other", "default"])
    for row, alone in enumerate((other, model)):
        expected = transcribe(alone, inputs)[row]
        shortest = min(len(expected), tokens.shape[1])
        assert torch.equal(tokens[row, :shortest], expected[:shortest])
