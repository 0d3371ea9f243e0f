"""Models whose weights are quantised by `torchao`, `bitsandbytes` or another library of Transformers' quantisers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

# The attribute by which Transformers marks a quantised model.
_MARK = "is_quantized"


def refuse_quantized_heads(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Raise where a module that is to be trained and stored has quantised weights, which receive no gradient.

    Raises:
        ValueError: one does.
    """
    for name in names:
        for parameter_name, parameter in model.get_submodule(name).named_parameters():
            if _is_quantized(parameter):
                raise ValueError(
                    f"modules_to_save: expected modules whose weights can be trained, got {name!r}, whose "
                    f"{parameter_name} is quantised ({type(parameter).__name__}, {parameter.dtype}); keep {name!r} out "
                    "of the quantisation (modules_to_not_convert of TorchAoConfig, llm_int8_skip_modules of "
                    "BitsAndBytesConfig, filter_fn of torchao's quantize_), or name other modules"
                )


def let_trainer_accept(model: PreTrainedModel) -> bool:
    """Let Transformers' ``Trainer`` train a quantised ``model`` that has a prefix; return True if that was needed.

    ``Trainer`` refuses a model with ``is_quantized`` unless it is PEFT's. ``model.hf_quantizer`` still tells how it is
    quantised. A model stays refused where its quantiser says that it cannot be trained through.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    needed = bool(getattr(model, _MARK, False)) and quantizer is not None and bool(quantizer.is_trainable)
    if needed:
        setattr(model, _MARK, False)
    return needed


def mark_as_quantized(model: PreTrainedModel) -> None:
    """Undo :func:`let_trainer_accept` where it returned True."""
    setattr(model, _MARK, True)


def _is_quantized(parameter: Tensor) -> bool:
    # DTensor is a wrapper too, and trains; torchao's wrappers give the dtype that they are dequantised to.
    wraps = is_traceable_wrapper_subclass(parameter) and not hasattr(parameter, "device_mesh")
    return wraps or not (parameter.is_floating_point() or parameter.is_complex())
