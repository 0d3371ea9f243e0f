"""PEFT's own prefix tuning on a tiny model of some type, and the same model after ``accelerate``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor

from benchmarks.compatibility.family_trial import GRADIENTS, LOGITS, PREFIX_LEN, inputs_of, is_refusal, line
from benchmarks.compatibility.model_types import tiny_model
from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers.storage.peft_table import pairs_of_layers

# Tasks of PEFT, by kind of model. Its prefix tuning has none for the other kinds.
TASKS = {
    "causal": "CAUSAL_LM",
    "sequence classification": "SEQ_CLS",
    "token classification": "TOKEN_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
}
TRAINS, IN_PART, FAILS = "trains", "in part", "fails"
EQUAL, REFUSED, DIFFERS, NONE = "equal", "refused", "differs", "-"


class PeftTrial(NamedTuple):
    """Columns of the CSV.

    Attributes:
        peft: TRAINS if both passes run and the prefix of every layer gets a gradient, IN_PART if only that of some
            layers does, or FAILS; NONE where PEFT has no task or the model was not tried.
        accelerated: EQUAL if logits and gradients are PEFT's, REFUSED by an error of this package, or DIFFERS; NONE
            where PEFT fails.
        peft_reason: why PEFT fails or trains in part, or why ``accelerate`` refuses or differs.
    """

    peft: str = NONE
    accelerated: str = NONE
    peft_reason: str = ""


def try_peft(kind: str, model_type: str) -> PeftTrial:
    """Try one model type, which :func:`tiny_model` must be able to build.

    Raises:
        KeyError: PEFT has no task for models of this kind.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = peft_model(kind, model_type)
            expected, expected_grad = _run(theirs)
        except Exception as error:
            return PeftTrial(FAILS, NONE, line(error))
        largest = _largest_by_layer(theirs, expected_grad)
        trained, reason = TRAINS, ""
        if not largest.min() > 0:
            without = [number for number, gradient in enumerate(largest) if not gradient > 0]
            trained, reason = IN_PART, f"no gradient in the prefix of layers {without} of {len(largest)}"
        try:
            actual, grad = _run(accelerate(copy.deepcopy(theirs)))
        except Exception as error:
            return PeftTrial(trained, REFUSED if is_refusal(error) else DIFFERS, line(error))
    difference, of = (grad - expected_grad).abs().max().item(), largest.max().item()
    if not (actual - expected).abs().max() < LOGITS:
        return PeftTrial(trained, DIFFERS, f"logits differ by {(actual - expected).abs().max():.1e}")
    if not difference < GRADIENTS * of:
        return PeftTrial(trained, DIFFERS, f"gradients differ by {difference:.1e} of {of:.1e}")
    return PeftTrial(trained, EQUAL, reason)


def peft_model(kind: str, model_type: str) -> PeftModel:
    """A tiny model in eval mode with an adapter of PEFT, the same one in every process."""
    base = tiny_model(kind, model_type)
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type=TASKS[kind], num_virtual_tokens=PREFIX_LEN)
    return get_peft_model(base, config).eval()


def _run(model: PeftModel) -> tuple[Tensor, Tensor]:
    """The logits where the text is not padded, and the gradient of PEFT's table ``[P, layers * 2 * width]``."""
    inputs = inputs_of(model.get_base_model(), "right")
    logits = model(**inputs).logits
    logits = logits * _weights(logits, inputs)
    (table,) = (parameter for parameter in model.prompt_encoder.parameters() if parameter.requires_grad)
    (grad,) = torch.autograd.grad(logits.square().sum(), [table], allow_unused=True)
    if grad is None:
        raise ValueError("no gradient in the prefix")
    return logits.detach(), grad


def _largest_by_layer(model: PeftModel, grad: Tensor) -> Tensor:
    """The largest gradient in the prefix of each layer ``[layers]``; in encoder-decoders some share theirs."""
    config = model.peft_config["default"]
    number, is_encoder_decoder = config.num_layers, config.num_transformer_submodules == 2
    largest = grad.view(PREFIX_LEN, number, -1).abs().amax((0, 2))
    return largest[pairs_of_layers(number, range(number), is_encoder_decoder=is_encoder_decoder)]


def _weights(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    mask = inputs["attention_mask"]
    if "decoder_input_ids" in inputs or logits.shape[:2] != mask.shape:
        return torch.ones(())
    return mask[..., None]
