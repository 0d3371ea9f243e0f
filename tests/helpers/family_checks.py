"""What must hold for every family of Transformers models, as functions of the family.

The modules ``test_transformers_*.py`` name their families and call these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from eager_prefix import eager_prefix
from tiny_models import P, trainable, without_dropout
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_named_prefix,
    load_prefix_model,
    save_prefix_model,
)
from prefix_kernels.integrations.transformers.storage.peft_table import table_from_peft
from prefix_kernels.integrations.transformers.structure.attention_sites import find_sites
from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout


def checkpoint_layers(model: PreTrainedModel, use_reentrant: bool) -> None:
    """As Transformers does it."""
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of model, and how to make a tiny random one.

    Attributes:
        name: its ``model_type``.
        model: makes one in eval mode, the same one for the same torch seed; takes settings of its config.
        inputs: its inputs for "none", "right" or "left" padding, without labels.
        labels: what it is trained on with those inputs; nothing at padding.
        paddings: those that it knows.
        peft_task: ``task_type`` of PEFT's prefix tuning; None where PEFT cannot run it.
        peft_settings: of PEFT's config, where it cannot find them itself.
        settings: of :class:`PrefixTuningConfig`, where they differ from the default.
        checkpoint: gives a prepared model activation checkpointing, reentrant or not.
        learning_rate: with which a prefix is trained in a few steps.
        trains_every_element: whether every element of the prefix receives a gradient (a dead ReLU would not let it).
    """

    name: str
    model: Callable[..., PreTrainedModel]
    inputs: Callable[[str], dict[str, Tensor]]
    labels: Callable[[dict[str, Tensor]], Tensor]
    paddings: tuple[str, ...] = ("none", "right", "left")
    peft_task: str | None = None
    peft_settings: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    checkpoint: Callable[[PreTrainedModel, bool], None] = checkpoint_layers
    learning_rate: float = 0.05
    trains_every_element: bool = True


def text_batch(padding: str, pad: int = 0, end: int = 97) -> dict[str, Tensor]:
    """Three rows of up to nine tokens below ``end``; with ``padding`` the second has six and the third three."""
    length = 9
    input_ids = torch.randint(3, end, (3, length))
    if padding == "none":
        return {"input_ids": input_ids}
    attention_mask = torch.ones_like(input_ids)
    for row, absent in enumerate([0, 3, 6]):
        where = slice(length - absent, length) if padding == "right" else slice(0, absent)
        attention_mask[row, where] = 0
        input_ids[row, where] = pad
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def prepared(family: Family, base: PreTrainedModel, **settings: object) -> PreTrainedModel:
    settings = {"num_virtual_tokens": P} | dict(family.settings) | settings
    return get_prefix_model(copy.deepcopy(base), PrefixTuningConfig(**settings))


def tables(model: PreTrainedModel) -> list[nn.Parameter]:
    """The prefixes, one table per group of attentions."""
    return list(model.prefix_encoder.parameters())


def with_peft(family: Family, base: PreTrainedModel, ours: PreTrainedModel) -> peft.PeftModel:
    """PEFT's prefix tuning of the same model, whose prefix ``ours`` gets."""
    config = peft.PrefixTuningConfig(task_type=family.peft_task, num_virtual_tokens=P, **family.peft_settings)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        ours.prefix_encoder.table.copy_(_as_ours(theirs.prompt_encoder.default.embedding.weight, ours))
    return theirs


def _as_ours(peft_table: Tensor, ours: PreTrainedModel) -> Tensor:
    _, slices, num_heads, head_dim = ours.prefix_encoder.table.shape
    is_encoder_decoder = ours.config.is_encoder_decoder
    return table_from_peft(peft_table, num_heads, head_dim, range(slices // 2), is_encoder_decoder=is_encoder_decoder)


def check_against_peft(family: Family, padding: str, **settings: object) -> None:
    base = family.model()
    ours = prepared(family, base, **settings)
    theirs = with_peft(family, base, ours)
    inputs = family.inputs(padding)
    labels = family.labels(inputs)

    our_output, their_output = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    our_output.loss.backward()
    their_output.loss.backward()

    valid = _valid(our_output.logits, inputs)
    torch.testing.assert_close(our_output.logits[valid], their_output.logits[valid], rtol=0, atol=1e-5)
    table = theirs.prompt_encoder.default.embedding.weight
    their_grad, table.grad = table.grad, None
    assert their_grad.abs().max() > 1e-2
    # Layers that share a slice of PEFT's table add up their gradients.
    _as_ours(table, ours).backward(ours.prefix_encoder.table.grad)
    torch.testing.assert_close(table.grad, their_grad, rtol=0, atol=1e-5)


def check_against_eager(family: Family, padding: str, **settings: object) -> None:
    """Against :mod:`eager_prefix`, with the model's own positions."""
    base = family.model()
    ours = prepared(family, base, position_offset="none", **settings)
    inputs = family.inputs(padding)
    labels = family.labels(inputs)
    output = ours(**inputs, labels=labels)
    output.loss.backward()
    grads = [table.grad for table in tables(ours)]
    assert max(grad.abs().max() for grad in grads) > 1e-2

    leaves = copy.deepcopy(ours.prefix_encoder)
    leaves.zero_grad()
    with eager_prefix(base, _pairs_by_module(base, ours.prefix_tuning_config, leaves)):
        expected = base(**inputs, labels=labels)
        expected.loss.backward()

    valid = _valid(output.logits, inputs)
    torch.testing.assert_close(output.logits[valid], expected.logits[valid], rtol=0, atol=1e-5)
    for grad, table in zip(grads, leaves.parameters(), strict=True):
        torch.testing.assert_close(grad, table.grad, rtol=0, atol=1e-5)


def _pairs_by_module(
    base: PreTrainedModel, config: PrefixTuningConfig, encoder: nn.Module
) -> dict[nn.Module, list[tuple[Tensor, Tensor]]]:
    layout = PrefixLayout(find_sites(base), config)
    pairs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for stack in layout.stacks:
        for site, pair in layout.pairs(encoder, stack).items():
            pairs.setdefault(layout.sites[site].module, []).append(pair)
    return pairs


def _valid(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor | slice:
    """The rows of ``logits`` that are not padding."""
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return mask.bool() if mask is not None and logits.shape[:2] == mask.shape else slice(None)


def check_training(family: Family) -> None:
    """The loss falls, every element of the prefix receives a gradient, and no weight of the model moves."""
    model = prepared(family, without_dropout(family.model()), modules_to_save=()).train()
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    assert all(name.startswith("prefix_encoder.") for name in trainable(model))
    inputs = family.inputs(family.paddings[0])
    labels = family.labels(inputs)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=family.learning_rate)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        for table in tables(model):
            reached = table.grad.ne(0)
            assert reached.all() if family.trains_every_element else reached.any()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name


def check_activation_checkpointing(family: Family, use_reentrant: bool, projection: bool) -> None:
    plain = prepared(family, family.model(), prefix_projection=projection, prefix_dropout=0.1).train()
    checkpointed = copy.deepcopy(plain)
    family.checkpoint(checkpointed, use_reentrant)
    inputs = family.inputs(family.paddings[0])
    labels = family.labels(inputs)
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        # Two passes accumulate, and the second forward pass runs before the first backward pass.
        losses = [model(**inputs, labels=labels).loss, 2 * model(**inputs, labels=labels).loss]
        for loss in losses:
            loss.backward()
    for name, parameter in trainable(plain).items():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(checkpointed.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def check_compiled(family: Family, padding: str = "none") -> None:
    """One graph of the whole model, and equal results."""
    model = prepared(family, family.model())
    inputs = family.inputs(padding)
    labels = family.labels(inputs)
    expected = model(**inputs, labels=labels)
    expected.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.zero_grad()

    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, labels=labels)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


def check_bfloat16(family: Family) -> None:
    """A bfloat16 model takes a float32 prefix; so does autocast."""
    base = family.model()
    exact = prepared(family, base)
    inputs = family.inputs(family.paddings[0])
    labels = family.labels(inputs)
    expected = exact(**inputs).logits
    valid = _valid(expected, inputs)
    tolerance = 0.1 * expected[valid].abs().max()

    halves = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in inputs.items()}
    model = prepared(family, copy.deepcopy(base).to(torch.bfloat16))
    model.prefix_encoder.load_state_dict(exact.prefix_encoder.state_dict())
    output = model(**halves, labels=labels)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    for table in tables(model):
        assert table.dtype == table.grad.dtype == torch.float32 and table.grad.isfinite().all()
    assert (output.logits - expected)[valid].abs().max() < tolerance

    with torch.autocast("cpu", torch.bfloat16):
        output = exact(**inputs, labels=labels)
    output.loss.backward()
    assert all(table.grad.isfinite().all() for table in tables(exact))
    assert (output.logits - expected)[valid].abs().max() < tolerance


def check_torch_baseline(family: Family, padding: str) -> None:
    base = family.model()
    ours = prepared(family, base)
    baseline = prepared(family, base, attention="torch")
    baseline.load_state_dict(ours.state_dict())
    inputs = family.inputs(padding)
    labels = family.labels(inputs)
    logits = []
    for model in (ours, baseline):
        output = model(**inputs, labels=labels)
        output.loss.backward()
        logits.append(output.logits[_valid(output.logits, inputs)])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    for table, expected in zip(tables(ours), tables(baseline), strict=True):
        torch.testing.assert_close(table.grad, expected.grad, rtol=0, atol=1e-5)


def check_mixed_batch(family: Family, folder: Path) -> None:
    """Rows that name a prefix get what the whole batch gets from it; the third has none."""
    base = family.model()
    inputs = family.inputs(family.paddings[-1])
    alone = {"default": prepared(family, base), "short": prepared(family, base, num_virtual_tokens=2)}
    expected = {name: model(**inputs).logits for name, model in alone.items()} | {None: base(**inputs).logits}
    for name, model in alone.items():
        save_prefix_model(model, folder / f"{name}.safetensors")
    mixed = load_prefix_model(copy.deepcopy(base), folder / "default.safetensors")
    load_named_prefix(mixed, "short", folder / "short.safetensors")
    names = ["short", "default", None]
    logits = mixed(**inputs, prefix_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(logits[row], expected[name][row])


def check_generation(
    family: Family, *, max_new_tokens: int = 8, caches: tuple[str, ...] = ("dynamic", "static"), **settings: object
) -> None:
    """Greedy, sampled and with 3 beams: every cache gives the tokens of full recomputation, for every padding."""
    model = prepared(family, family.model(), **settings)
    for padding in [padding for padding in family.paddings if padding != "right" or model.config.is_encoder_decoder]:
        inputs = family.inputs(padding)
        for name in ("decoder_input_ids", "decoder_attention_mask"):
            inputs.pop(name, None)
        for search in ({}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}):
            search = {"max_new_tokens": max_new_tokens, "do_sample": False} | search

            def generate(search: dict = search, inputs: dict = inputs, **more: object) -> Tensor:
                torch.manual_seed(3)
                return model.generate(**inputs, **search, **more)

            expected = generate(use_cache=False)
            prompt = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            assert len(expected[:, prompt:].unique()) > 3, "a model that repeats one token would hide mistakes"
            if "dynamic" in caches:
                assert torch.equal(generate(), expected), (padding, search, "dynamic")
            if "static" in caches:
                static = generate(cache_implementation="static", disable_compile=True)
                assert torch.equal(static, expected), (padding, search, "static")
