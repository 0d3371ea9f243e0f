"""Settings of :func:`prefix_kernels.integrations.transformers.get_prefix_model`."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from prefix_kernels._files import LARGEST_SIZE, parse_json

POSITION_OFFSETS = ("peft", "none")
ATTENTIONS = ("prefix_kernels", "torch", "cache")
# The name of the config in the metadata of a stored task's file.
CONFIG_KEY = "prefix_tuning_config"

PrefixLengths = int | Sequence[int]
_T = TypeVar("_T")


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
            ``scaled_dot_product_attention``, the baseline to compare with. ``"cache"``: the model's own attention,
            which finds the prefix before the keys and values of its cache, as in PEFT; ``"prefix_kernels"`` means this
            too, and warns, for a model with a cache whose attention function cannot be replaced, or whose heads are
            too wide for the kernels. Then all layers have a prefix, of one length, which slides out of sliding windows.
        inference_mode: nothing is trainable, and the prefix is a table even with ``prefix_projection``.

    The fields hold plain Python, which JSON can store: other integers, sequences and mappings are converted.

    Raises:
        ValueError: a value of a wrong type (a bool is no number) or out of range; the message names the setting.
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
        self._check_types()
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
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError(
                f"encoder_hidden_size: expected None without prefix_projection=True, got {self.encoder_hidden_size}"
            )
        if not 0.0 <= self.prefix_dropout <= 1.0:
            raise ValueError(f"prefix_dropout: expected a probability in [0, 1], got {self.prefix_dropout}")
        if self.init_std is not None and not (math.isfinite(self.init_std) and self.init_std >= 0):
            raise ValueError(f"init_std: expected None or a finite number of at least 0, got {self.init_std}")
        for name, choices in {"position_offset": POSITION_OFFSETS, "attention": ATTENTIONS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.position_offset == "peft" and len(set(self.prefix_lengths())) > 1:
            raise ValueError(
                "position_offset: expected 'none' where prefixes differ in length (there is no one offset to move "
                "positions by), got 'peft'"
            )

    def _check_types(self) -> None:
        """Let every field hold plain Python of its type, sizes and numbers of layers in range."""
        self.num_virtual_tokens = _by_kind("num_virtual_tokens", self.num_virtual_tokens, _lengths)
        self.num_frozen_tokens = _integer("num_frozen_tokens", self.num_frozen_tokens)
        if self.encoder_hidden_size is not None:
            self.encoder_hidden_size = _integer("encoder_hidden_size", self.encoder_hidden_size, 1)
        self.prefix_dropout = _number("prefix_dropout", self.prefix_dropout, "a probability in [0, 1]")
        if self.init_std is not None:
            self.init_std = _number("init_std", self.init_std, "None or a finite number of at least 0")
        if self.modules_to_save is not None:
            self.modules_to_save = _list("modules_to_save", self.modules_to_save, _name, may_be_empty=True)
        if self.target_attentions is not None:
            self.target_attentions = _list("target_attentions", self.target_attentions, _name)
        if self.layers is not None:
            self.layers = _by_kind("layers", self.layers, _layer_numbers)
        for name in ("prefix_projection", "window_includes_prefix", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {reprlib.repr(getattr(self, name))}")
        for name in ("position_offset", "attention"):
            _name(name, getattr(self, name))

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
            ValueError: a name that is no field, or a value that the class refuses.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, values.keys() - set(known))):
            raise ValueError(f"PrefixTuningConfig: expected fields among {known}, got {reprlib.repr(unknown)}")
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> PrefixTuningConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: no JSON object, or one that :meth:`from_dict` refuses.
        """
        return cls.from_dict(parse_json(text, dict, "PrefixTuningConfig"))


def _integer(name: str, value: object, smallest: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: expected an int, got {reprlib.repr(value)}")
    number = int(value)
    if smallest is not None and number < smallest:
        raise ValueError(f"{name}: expected at least {smallest}, got {value}")
    if number > LARGEST_SIZE:
        raise ValueError(f"{name}: expected at most {LARGEST_SIZE}, got {reprlib.repr(value)}")
    return number


def _number(name: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: expected {expected}, got {reprlib.repr(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected {expected}, got {reprlib.repr(value)}") from error


def _name(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {reprlib.repr(value)}")
    return value


def _list(name: str, values: object, read: Callable[[str, Any], _T], *, may_be_empty: bool = False) -> list[_T]:
    """``values`` as a list, ``read(name, value)`` in place of each."""
    if isinstance(values, str | bytes):
        raise ValueError(f"{name}: expected a sequence, got the string {reprlib.repr(values)}")
    try:
        given = None if isinstance(values, Mapping) else list(cast(Iterable[object], values))
    except TypeError:  # of numbers, and of tensors and arrays without dimensions
        given = None
    if given is None:
        raise ValueError(f"{name}: expected a sequence, got {reprlib.repr(values)}")
    if not given and not may_be_empty:
        raise ValueError(f"{name}: expected at least one, got none")
    return [read(name, value) for value in given]


def _by_kind(name: str, value: object, read: Callable[[str, Any], Any]) -> Any:
    """``read(name, value)``, or a dict of that for each kind of attention."""
    if not isinstance(value, Mapping):
        return read(name, value)
    if not value:
        raise ValueError(f"{name}: expected at least one kind of attention, got none")
    for kind in value:
        if not isinstance(kind, str):
            raise ValueError(f"{name}: expected kinds of attention by name, got {reprlib.repr(kind)}")
    return {kind: read(name, one) for kind, one in value.items()}


def _lengths(name: str, value: object) -> int | list[int]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return _list(name, value, lambda name, length: _integer(name, length, 1))
    return _integer(name, value, 1)


def _layer_numbers(name: str, value: object) -> list[int]:
    return _list(name, value, lambda name, layer: _integer(name, layer, 0))
