"""Models whose weights `accelerate` keeps in memory or on disk between the calls of their modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, attach_align_device_hook
from tiny_models import (
    LABELS,
    P,
    bart_with_large_weights,
    batch,
    t5_with_a_deep_decoder,
    tiny_model,
    trainable,
    with_peft,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    initialize_from_prefix,
    initialize_from_text,
    initialize_like_keys,
    load_named_prefix,
    load_prefix_model,
    remove_prefix,
    save_prefix_model,
)
from prefix_kernels.integrations.transformers.structure.offload import running_device

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": lambda: tiny_model("gpt2", AutoModelForCausalLM),
    "llama": lambda: tiny_model("llama", AutoModelForCausalLM),
    "opt": lambda: tiny_model("opt", AutoModelForCausalLM, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "t5": t5_with_a_deep_decoder,
    "bart": bart_with_large_weights,
}
CAUSAL = ("gpt2", "llama", "opt")


def on_cpu(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return disk_offload(model, folder / "weights", execution_device=torch.device("cpu"))


def first_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The first half of its modules on disk, the rest in memory and without a hook that loads weights."""
    names = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    first = names[: len(names) // 2]
    on_disk = {id(x) for name in first for x in model.get_submodule(name).parameters()}
    tied = [name for name in names if any(id(x) in on_disk for x in model.get_submodule(name).parameters())]
    places = {name: "disk" if name in tied else "cpu" for name in names}
    rest = {name: "cpu" for name in model.state_dict() if name.rpartition(".")[0] not in names}
    return dispatch_model(model, places | rest, main_device="cpu", offload_dir=folder / "weights", force_hooks=True)


def by_blocks(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """All of it in memory, the weights of a layer loaded together."""
    loaded_together = list(model._no_split_modules)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach_align_device_hook(
        model, torch.device("cpu"), offload=True, weights_map=weights, preload_module_classes=loaded_together
    )
    return model


OFFLOADS = (on_cpu, on_disk, first_on_disk, by_blocks)
each_model = pytest.mark.parametrize("name", MODELS)
each_offload = pytest.mark.parametrize("offload", OFFLOADS, ids=lambda one: one.__name__)


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "bert":
        return batch(name, "right") | {"labels": LABELS}
    inputs = batch(name, "left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)
    return inputs | {"labels": labels if name in CAUSAL else torch.randint(3, 97, (3, 5))}


def pair_of_models(
    name: str, offload: Callable[[PreTrainedModel, Path], PreTrainedModel], folder: Path, **settings: object
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Prepared models of the same weights and prefixes: a plain one, and one that was offloaded before."""
    base = MODELS[name]()
    config = PrefixTuningConfig(**({"num_virtual_tokens": P} | settings))
    plain = get_prefix_model(copy.deepcopy(base), config)
    offload(base, folder)
    assert base.device.type == "meta"
    offloaded = get_prefix_model(base, config)
    offloaded.prefix_encoder.load_state_dict(plain.prefix_encoder.state_dict())
    return plain, offloaded


@pytest.mark.parametrize("position_offset", ["peft", "none"])
@each_offload
@each_model
def test_an_offloaded_model_gives_and_learns_the_same(
    name: str, offload: Callable, position_offset: str, tmp_path: Path
) -> None:
    models = pair_of_models(name, offload, tmp_path, position_offset=position_offset)
    inputs = inputs_of(name)
    first, second = [], []
    for model in models:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        output = model(**inputs)
        output.loss.backward()
        first.append((output.logits, {key: x.grad.clone() for key, x in trainable(model).items()}))
        optimizer.step()
        second.append((model(**inputs).logits, trainable(model)))
    for (logits, tensors), (other_logits, other_tensors) in (first, second):
        torch.testing.assert_close(logits, other_logits, rtol=0, atol=0)
        assert tensors.keys() == other_tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, other_tensors[key], rtol=0, atol=0)
    assert not torch.allclose(first[0][0], second[0][0])


@each_offload
def test_a_trained_head_is_stored_and_loaded_into_an_offloaded_model(offload: Callable, tmp_path: Path) -> None:
    plain, offloaded = pair_of_models("bert", offload, tmp_path)
    with torch.no_grad():
        offloaded.classifier.weight.normal_()
        plain.classifier.load_state_dict(offloaded.classifier.state_dict())
    inputs = inputs_of("bert")
    expected = plain(**inputs).logits
    save_prefix_model(offloaded, tmp_path / "task")
    for target in (remove_prefix(plain), remove_prefix(offloaded)):
        with torch.no_grad():
            target.classifier.weight.zero_()
        torch.testing.assert_close(load_prefix_model(target, tmp_path / "task")(**inputs).logits, expected)


@each_offload
def test_a_language_model_head_is_trained_offloaded_unless_it_is_tied(offload: Callable, tmp_path: Path) -> None:
    inputs, logits = inputs_of("llama"), []
    for model in pair_of_models("llama", offload, tmp_path, modules_to_save=["lm_head"]):
        model(**inputs).loss.backward()
        torch.optim.SGD(trainable(model).values(), lr=0.1).step()
        logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    model = offload(MODELS["gpt2"](), tmp_path / "tied")
    with pytest.raises(
        ValueError, match="modules_to_save: expected modules that share no offloaded weights, got 'lm_h"
    ):
        get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=P, modules_to_save=["lm_head"]))
    assert not hasattr(model, "prefix_encoder") and model.device.type == "meta"
    get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=P))


@each_offload
@each_model
def test_offloaded_models_are_initialised(name: str, offload: Callable, tmp_path: Path) -> None:
    models = pair_of_models(name, offload, tmp_path)
    text, more = torch.randint(3, 97, (1, 8)), {}
    if name in ("t5", "bart"):
        more = {"decoder_input_ids": torch.randint(3, 97, (1, 8))}
    for write in (
        lambda model: initialize_from_text(model, text, **more),
        lambda model: initialize_like_keys(model, input_ids=text, **more, generator=torch.Generator().manual_seed(0)),
        lambda model: initialize_from_prefix(model, models[0]),
    ):
        before = [table.clone() for table in models[1].prefix_encoder.parameters()]
        for model in models:
            write(model)
        tables = list(models[1].prefix_encoder.parameters())
        for table, other in zip(tables, models[0].prefix_encoder.parameters(), strict=True):
            torch.testing.assert_close(table, other)
        assert torch.equal(before[0], tables[0]) == torch.equal(before[0], next(models[0].prefix_encoder.parameters()))


@each_offload
@each_model
def test_rows_of_different_tasks_run_offloaded(name: str, offload: Callable, tmp_path: Path) -> None:
    models = pair_of_models(name, offload, tmp_path)
    other = get_prefix_model(MODELS[name](), PrefixTuningConfig(num_virtual_tokens=3))
    inputs = inputs_of(name)
    if name == "bert":
        for model in models:
            other.classifier.load_state_dict(models[0].classifier.state_dict())
            model.classifier.load_state_dict(models[0].classifier.state_dict())
    save_prefix_model(other, tmp_path / "other")
    logits = []
    for model in models:
        load_named_prefix(model, "other", tmp_path / "other")
        logits.append(model(**inputs, prefix_names=["other", None, "default"]).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)


@each_offload
@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert"])
def test_an_offloaded_model_generates_the_same(name: str, offload: Callable, tmp_path: Path) -> None:
    plain, offloaded = pair_of_models(name, offload, tmp_path)
    if name == "t5":
        # Transformers reads the size of T5's cache from the encoder's number of layers.
        for model in (plain, offloaded):
            model.config.num_layers = model.config.num_decoder_layers
    inputs = {key: x for key, x in inputs_of(name).items() if key != "labels"}
    tokens = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (plain, offloaded)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_peft_model_whose_base_is_offloaded_is_accelerated(name: str) -> None:
    base, task = MODELS[name](), "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    theirs = with_peft(base, get_prefix_model(copy.deepcopy(base), PrefixTuningConfig(num_virtual_tokens=P)), task)
    inputs = inputs_of(name)
    expected = theirs(**inputs).logits
    cpu_offload(theirs.base_model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(theirs(**inputs).logits, expected)
    torch.testing.assert_close(accelerate(theirs)(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_a_model_on_the_meta_device_stays_there() -> None:
    with torch.device("meta"):
        model = MODELS["llama"]()
    assert running_device(model).type == "meta"
    model = get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=P))
    assert model.prefix_encoder.table.is_meta
    assert model(torch.ones(1, 4, dtype=torch.int64, device="meta")).logits.shape == (1, 4, 99)


def test_the_hooks_of_the_attentions_name_the_device() -> None:
    """Whatever module comes first, and whatever form the device is given in."""
    for device in (torch.device("cuda", 1), "cuda:1"):
        model = MODELS["bert"]()
        model.bert.embeddings.word_embeddings._hf_hook = AlignDevicesHook(execution_device="cpu")
        assert running_device(model).type == "cpu"
        model.bert.encoder.layer[0].attention.self.query._hf_hook = SequentialHook(
            ModelHook(), AlignDevicesHook(execution_device=device)
        )
        assert running_device(model) == torch.device("cuda", 1)
    model = MODELS["bert"]()
    model.bert.encoder.layer[0]._hf_hook = AlignDevicesHook(execution_device="cuda:1")
    assert running_device(model) == torch.device("cuda", 1)
    model = MODELS["bert"]()
    model.bert.embeddings.to("meta")
    assert model.device.type == "meta" and running_device(model).type == "cpu"
