"""What :func:`prefix_kernels.integrations.transformers.get_prefix_model` can be told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

POSITION_OFFSETS = ("peft", "none")
ATTENTIONS = ("prefix_kernels", "torch")


@dataclass
class PrefixTuningConfig:
    """Prefix tuning of a Transformers model: P-tuning v2 (Liu et al., 2022), or Li and Liang (2021) with a projection.

    Args:
        num_virtual_tokens: ``P``, the prefix length of every layer, at least 1.
        prefix_projection: generate the prefix by an MLP while training (see :class:`prefix_kernels.PrefixEncoder`).
        encoder_hidden_size: hidden size of that MLP. Default: the width of the model's keys, ``Hkv * D``.
        prefix_dropout: probability with which prefix entries are zeroed while training.
        init_std: standard deviation of the initial prefix. Default: 1.0, as in PEFT.
        modules_to_save: modules trained and stored with the prefix, by name. Default: the head that a fine-tuned model
            starts at random (``classifier``, ``score`` or ``qa_outputs``, whichever the model has). ``()``: none.
        position_offset: ``"peft"`` lets the sequence's positions begin at ``P``, as they do in PEFT, whose checkpoints
            expect it; the last ``P`` positions of a learned position table are then out of reach. ``"none"`` keeps the
            model's own positions.
        attention: ``"prefix_kernels"``, or ``"torch"``: the same model with ``torch.cat`` and
            ``scaled_dot_product_attention``, the baseline to compare with.
        inference_mode: nothing is trainable, and the prefix is a table even with ``prefix_projection``.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    prefix_dropout: float = 0.0
    init_std: float | None = None
    modules_to_save: Sequence[str] | None = None
    position_offset: str = "peft"
    attention: str = "prefix_kernels"
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "encoder_hidden_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError(
                f"encoder_hidden_size: expected None without prefix_projection=True, got {self.encoder_hidden_size}"
            )
        if not 0.0 <= self.prefix_dropout <= 1.0:
            raise ValueError(f"prefix_dropout: expected a probability in [0, 1], got {self.prefix_dropout}")
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save: expected a sequence of names, got the string {self.modules_to_save!r}")
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)
        for name, choices in {"position_offset": POSITION_OFFSETS, "attention": ATTENTIONS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrefixTuningConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a name that is no field.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"PrefixTuningConfig: expected fields among {known}, got {unknown}")
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> PrefixTuningConfig:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))
