"""Proof that a prefix in a tiny model of some type does what it should: the trial of one model type."""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import prefix_kernels
from benchmarks.compatibility.media_inputs import BAD_INPUT, NoMedia, audio_inputs, image_inputs, padded, speech_inputs
from benchmarks.compatibility.model_types import tiny_model
from benchmarks.compatibility.own_attention import Pairs, concatenated, with_cache
from benchmarks.compatibility.own_cache import holding
from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.integrations.transformers.structure.routes import find_layout, uses_cache
from prefix_kernels.integrations.transformers.structure.windows import has_sliding_window

PREFIX_LEN = 5
NEW_TOKENS = 8
# Differences allowed between logits, and between gradients relative to the largest: float32, two layers.
LOGITS, GRADIENTS = 1e-4, 1e-3
RIGHT, REFUSED, NOT_TRIED, WRONG = "right", "refused", "not tried", "WRONG"
IMAGES, SOUND, NO_MEDIA = "images", "sound", "-"
KERNELS, CACHE = "kernels", "cache"
# Model types whose own cache cannot hold a prefix from outside, and why.
NO_OWN_CACHE = {
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "layers that share keys"),
    "minimax": "a cache class of its own",
    "zamba": "an attention that several layers share has no number in the cache",
    "recurrent_gemma": "states that lie in its modules",
}
# Model types whose masks choose the keys of each query, and may choose none of the prefix.
MAY_HIDE_PREFIX = ("doge",)
# Model types that, without any prefix, choose other tokens with a cache than without.
OWN_CACHE_DIFFERS = ("moshi", "xlm-roberta-xl")


class Trial(NamedTuple):
    """A line of the CSV.

    Attributes:
        kind, model_type: see :mod:`benchmarks.compatibility.model_types`.
        attentions: the number of those with a prefix.
        result: RIGHT, REFUSED, NOT_TRIED or WRONG.
        reason: the error with which the model was refused or could not be built, or the difference that is wrong.
        peft, accelerated, peft_reason: see :class:`benchmarks.compatibility.peft_trial.PeftTrial`.
        media: IMAGES or SOUND if the model was given them, NO_MEDIA if not.
        way: KERNELS, or CACHE where the model's own attention reads the prefix in its cache; empty: it has no prefix.
    """

    kind: str
    model_type: str
    attentions: int
    result: str
    reason: str
    peft: str = "-"
    accelerated: str = "-"
    peft_reason: str = ""
    media: str = NO_MEDIA
    way: str = ""


class _Difference(AssertionError):
    """Results that should be equal are not."""


def try_family(kind: str, model_type: str) -> Trial:
    """Try one model type; only an error of this package is a refusal."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = tiny_model(kind, model_type)
            cases, media = _cases(base, kind)
        except Exception as error:
            return Trial(kind, model_type, 0, NOT_TRIED, line(error))
        found = {"attentions": 0, "media": media}
        try:
            by_cache = uses_cache(base, PrefixTuningConfig())
            found["attentions"] = len(_layout(_prepared(base, window_includes_prefix=by_cache)).sites)
            found["way"] = CACHE if by_cache else KERNELS
            (_check_cached if by_cache else _check)(base, kind, cases)
        except _Difference as error:
            return Trial(kind, model_type, result=WRONG, reason=line(error), **found)
        except Exception as error:
            return Trial(kind, model_type, result=REFUSED if is_refusal(error) else WRONG, reason=line(error), **found)
    return Trial(kind, model_type, result=RIGHT, reason="", **found)


def _check(base: PreTrainedModel, kind: str, cases: Mapping[str, dict[str, Tensor]]) -> None:
    model = _prepared(base, position_offset="none")
    for case, inputs in cases.items():
        with concatenated(base, _pairs_by_module(base, model.prefix_encoder)):
            _compare(case, model, model(**inputs).logits, base(**inputs).logits, inputs)
    if kind != "causal":
        return
    if base.config.model_type not in OWN_CACHE_DIFFERS:
        _check_generation(base, model)
    if not _has_latents(base) and base.config.model_type not in NO_OWN_CACHE and _slides_with_prefix(base):
        model = _prepared(base, position_offset="peft", window_includes_prefix=True)
        plain = copy.deepcopy(base)
        for padding in _paddings(base):
            inputs = inputs_of(base, padding)
            expected = with_cache(plain, _pairs_by_module(plain, model.prefix_encoder), inputs).logits
            position_ids = torch.arange(inputs["input_ids"].shape[1])[None]
            actual = model(**inputs, position_ids=position_ids).logits
            _compare(f"own cache, {padding}", model, actual, expected, inputs)


def _check_cached(base: PreTrainedModel, kind: str, cases: Mapping[str, dict[str, Tensor]]) -> None:
    """Compare with the model's own cache, where the positions of the sequence begin behind the prefix."""
    model = _prepared(base, window_includes_prefix=True)
    layout = _layout(model)
    pairs = layout.pairs(model.prefix_encoder, layout.stacks[0])
    oracle = holding(base, {site.cache_layer: pairs[number] for number, site in enumerate(layout.sites)})
    with oracle:
        expected = {case: base(**inputs).logits for case, inputs in cases.items()}
        for case, inputs in cases.items():
            _compare(case, model, model(**inputs).logits, expected[case], inputs)
        if kind == "causal":
            # Padding on the left takes room in the windows.
            _check_greedy_tokens(base, model, "none" if has_sliding_window(base) else "left", first_position=PREFIX_LEN)


def _cases(base: PreTrainedModel, kind: str) -> tuple[dict[str, dict[str, Tensor]], str]:
    """The inputs to compare with, by name, all of which the plain model takes, and the media among them.

    Raises:
        Exception: it takes neither text alone nor media; whatever Transformers raises.
    """
    if kind in ("audio classification", "speech seq2seq"):
        inputs = speech_inputs(base)
        return {"sound, none": inputs} | _with_shorter_sound(base, inputs), SOUND
    cases: dict[str, dict[str, Tensor]] = {}
    media = NO_MEDIA
    make = {"image-text-to-text": image_inputs, "audio-text-to-text": audio_inputs}.get(kind)
    if make is not None:
        try:
            inputs = make(base)
        except NoMedia:
            pass
        else:
            media = IMAGES if make is image_inputs else SOUND
            cases = {f"{media}, {padding}": padded(inputs, padding) for padding in ("none", "left", "right")}
    try:
        with torch.no_grad():
            base(**inputs_of(base, "none"))
        cases |= {padding: inputs_of(base, padding) for padding in _paddings(base)}
    except BAD_INPUT:
        if not cases:
            raise
    return cases, media


def _with_shorter_sound(base: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same with a second row whose last quarter is padding, if the model takes such a mask."""
    sound = next(inputs[name] for name in ("input_values", "input_features") if name in inputs)
    for length in {sound.shape[1], sound.shape[-1]}:
        mask = torch.ones(sound.shape[0], length, dtype=torch.int64)
        mask[1, length - length // 4 :] = 0
        try:
            with torch.no_grad():
                base(**inputs, attention_mask=mask)
        except BAD_INPUT:
            continue
        return {"sound, right": inputs | {"attention_mask": mask}}
    return {}


def _prepared(base: PreTrainedModel, **settings: object) -> PreTrainedModel:
    config = PrefixTuningConfig(num_virtual_tokens=PREFIX_LEN, modules_to_save=(), init_std=0.5, **settings)
    return get_prefix_model(copy.deepcopy(base), config)


def _slides_with_prefix(base: PreTrainedModel) -> bool:
    """Return True if the prefix can slide out of sight, as it does in the model's own cache."""
    try:
        _prepared(base, window_includes_prefix=True)
    except ValueError:
        return False
    return True


def _compare(
    where: str, model: PreTrainedModel, actual: Tensor, expected: Tensor, inputs: Mapping[str, Tensor]
) -> None:
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    mask = inputs.get("attention_mask")
    if (
        mask is not None
        and "input_ids" in inputs
        and "decoder_input_ids" not in inputs
        and weights.shape[:2] == mask.shape
    ):
        weights *= mask[..., None]
    tables = list(model.prefix_encoder.parameters())
    ours, theirs = (torch.autograd.grad((logits * weights).sum(), tables) for logits in (actual, expected))
    difference = ((actual - expected) * (weights != 0)).abs().max().item()
    if not difference < LOGITS:
        raise _Difference(f"{where}: logits differ by {difference:.1e}")
    for grad, expected_grad in zip(ours, theirs, strict=True):
        largest = expected_grad.abs().amax((0, 2, 3))
        if not (grad - expected_grad).abs().max() < GRADIENTS * largest.max():
            raise _Difference(
                f"{where}: gradients differ by {(grad - expected_grad).abs().max():.1e} of {largest.max():.1e}"
            )
        hides = model.config.model_type in MAY_HIDE_PREFIX
        if where.endswith("none") and not hides and not largest.min() > 0:
            raise _Difference(f"{where}: the prefix of an attention gets no gradient")


def _check_generation(base: PreTrainedModel, model: PreTrainedModel) -> None:
    with concatenated(base, _pairs_by_module(base, model.prefix_encoder)):
        _check_greedy_tokens(base, model, "left", first_position=0)


def _check_greedy_tokens(base: PreTrainedModel, model: PreTrainedModel, padding: str, first_position: int) -> None:
    """Compare tokens, made with a cache, with the logits of the whole text, which ``base`` gives with the prefix."""
    inputs = inputs_of(base, padding)
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, forced_eos_token_id=None
    )
    whole = {
        "input_ids": tokens,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS), value=1),
    }
    positions = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0) + first_position
    with torch.no_grad():
        takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        logits = base(**whole, **({"position_ids": positions} if takes_positions else {})).logits
    logits = logits[:, length - 1 : -1]
    chosen = logits.gather(-1, tokens[:, length:, None])[..., 0]
    short = (logits.amax(-1) - chosen).max().item()
    if not short < LOGITS:
        raise _Difference(f"greedy tokens: the logit of one is {short:.1e} below the largest")


def _layout(model: PreTrainedModel) -> PrefixLayout:
    return find_layout(model, PrefixTuningConfig(num_virtual_tokens=PREFIX_LEN))


def _pairs_by_module(model: PreTrainedModel, encoder: nn.Module) -> dict[nn.Module, Pairs]:
    """The prefixes in ``encoder``, for the attentions of ``model`` or of its copy, by module and call."""
    layout = _layout(model)
    pairs = {site: pair for stack in layout.stacks for site, pair in layout.pairs(encoder, stack).items()}
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for number, site in enumerate(layout.sites):
        found.setdefault(site.module, []).append(pairs[number])
    return found


def _has_latents(model: PreTrainedModel) -> bool:
    return any(hasattr(site.module, "kv_lora_rank") for site in _layout(model).sites)


def _paddings(model: PreTrainedModel) -> Iterable[str]:
    if model.main_input_name == "pixel_values":
        return ("none",)
    return ("none", "left", "right")


def inputs_of(model: PreTrainedModel, padding: str) -> dict[str, Tensor]:
    """Two rows of nine tokens, the second padded on one side; or two images."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 16)
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    ids, mask = torch.randint(3, 90, (2, 9), generator=generator), torch.ones(2, 9, dtype=torch.int64)
    if padding != "none":
        mask[1, slice(0, 3) if padding == "left" else slice(6, 9)] = 0
    if hasattr(model, "classification_head"):
        ids[:, 5] = model.config.eos_token_id  # the one whose state is classified
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        takes_text = hasattr(model, "classification_head")
        inputs["decoder_input_ids"] = inputs["input_ids"] if takes_text else ids[:, :6].contiguous()
    return inputs


def is_refusal(error: BaseException) -> bool:
    """Return True if this package raised ``error`` to refuse a model, not something that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(frames[-1].filename).is_relative_to(Path(prefix_kernels.__file__).parent)
    return ours and isinstance(error, ValueError | NotImplementedError | RuntimeError)


def line(error: BaseException) -> str:
    """Return the type and the message of ``error`` on one line, cut after 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
