"""What :func:`prefix_kernels.integrations.transformers.get_prefix_model` can be told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

POSITION_OFFSETS = ("peft", "none")
ATTENTIONS = ("prefix_kernels", "torch")
# What a stored task calls its config in the metadata of its file.
CONFIG_KEY = "prefix_tuning_config"

PrefixLengths = int | Sequence[int]


@dataclass
class PrefixTuningConfig:
    """Prefix tuning of a Transformers model: P-tuning v2 (Liu et al., 2022), or Li and Liang (2021) with a projection.

    Args:
        num_virtual_tokens: ``P``, the prefix length, at least 1: one for all layers, one per prepared layer, or either
            of these for each kind of attention by name.
        num_frozen_tokens: the first tokens of each prefix that are not trained, from 0 to the shortest length; as in
            PEFT's type CARTRIDGE. They can begin as those of a text: ``initialize_from_text``.
        prefix_projection: generate the prefix by an MLP while training (see :class:`prefix_kernels.PrefixEncoder`).
        encoder_hidden_size: hidden size of that MLP. Default: the width of the model's keys, ``Hkv * D``.
        prefix_dropout: probability with which prefix entries are zeroed while training.
        init_std: standard deviation of the initial prefix. Default: 1.0, as in PEFT.
        modules_to_save: modules trained and stored with the prefix, by name. Default: the head that a fine-tuned model
            starts at random (``classifier``, ``score``, ``qa_outputs``, ..., whichever the model has). ``()``: none.
        target_attentions: which kinds of attention get a prefix: ``"encoder"``, ``"decoder"`` and ``"cross"`` in an
            encoder-decoder model, ``"text"`` and ``"vision"`` in a model of two towers, ``"self"`` elsewhere. Default:
            all that the model has.
        layers: the layers that get a prefix, counted from 0: the same for each kind of attention, or those of each kind
            by name. Default: all.
        position_offset: ``"peft"`` lets the sequence's positions begin at ``P``, as they do in PEFT, whose checkpoints
            expect it; the last ``P`` positions of a learned position table are then out of reach. ``"none"`` keeps the
            model's own positions. Patches of images are numbered by their place: neither moves them. Of encoder-decoder
            models it is the decoder whose positions move, as in PEFT. Relative positions (T5) stay: with ``"peft"`` the
            prefix of a self-attention gets the bias of ``P`` positions before the sequence, with ``"none"`` it gets no
            bias; nor does that of cross-attention.
        window_includes_prefix: where a layer attends within a sliding window: True counts the prefix as positions
            before the sequence, so that it slides out of sight, as in PEFT; False keeps all of it visible.
        attention: ``"prefix_kernels"``, or ``"torch"``: the same model with ``torch.cat`` and
            ``scaled_dot_product_attention``, the baseline to compare with.
        inference_mode: nothing is trainable, and the prefix is a table even with ``prefix_projection``.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    num_virtual_tokens: PrefixLengths | Mapping[str, PrefixLengths] = 20
    num_frozen_tokens: int = 0
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    prefix_dropout: float = 0.0
    init_std: float | None = None
    modules_to_save: Sequence[str] | None = None
    target_attentions: Sequence[str] | None = None
    layers: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    position_offset: str = "peft"
    window_includes_prefix: bool = False
    attention: str = "prefix_kernels"
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for length in self.prefix_lengths():
            if length < 1:
                raise ValueError(f"num_virtual_tokens: expected at least 1, got {length}")
        if not 0 <= self.num_frozen_tokens <= min(self.prefix_lengths()):
            raise ValueError(
                f"num_frozen_tokens: expected 0 to {min(self.prefix_lengths())}, the length of the shortest prefix, "
                f"got {self.num_frozen_tokens}"
            )
        if self.num_frozen_tokens and self.prefix_projection:
            raise ValueError(
                "num_frozen_tokens: expected 0 with prefix_projection=True (every token moves with the MLP that "
                f"generates it), got {self.num_frozen_tokens}"
            )
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ValueError(f"encoder_hidden_size: expected at least 1, got {self.encoder_hidden_size}")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError(
                f"encoder_hidden_size: expected None without prefix_projection=True, got {self.encoder_hidden_size}"
            )
        if not 0.0 <= self.prefix_dropout <= 1.0:
            raise ValueError(f"prefix_dropout: expected a probability in [0, 1], got {self.prefix_dropout}")
        for name in ("modules_to_save", "target_attentions", "layers"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise ValueError(f"{name}: expected a sequence, got the string {values!r}")
            if name == "layers" and isinstance(values, Mapping):
                self.layers = {role: list(layers) for role, layers in values.items()}
            elif values is not None:
                setattr(self, name, list(values))
        chosen = list(self.layers.values()) if isinstance(self.layers, Mapping) else [self.layers]
        for name, values in [("target_attentions", self.target_attentions), *(("layers", one) for one in chosen)]:
            if values == []:
                raise ValueError(f"{name}: expected at least one, got none")
        for layers in chosen:
            if layers is not None and min(layers) < 0:
                raise ValueError(f"layers: expected numbers from 0 on, got {min(layers)}")
        for name, choices in {"position_offset": POSITION_OFFSETS, "attention": ATTENTIONS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.position_offset == "peft" and len(set(self.prefix_lengths())) > 1:
            raise ValueError(
                "position_offset: expected 'none' where prefixes differ in length (there is no one offset to move "
                "positions by), got 'peft'"
            )

    def prefix_lengths(self) -> list[int]:
        """All lengths that ``num_virtual_tokens`` names."""
        given = self.num_virtual_tokens
        lengths = given.values() if isinstance(given, Mapping) else [given]
        return [n for length in lengths for n in ([length] if isinstance(length, int) else length)]

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
