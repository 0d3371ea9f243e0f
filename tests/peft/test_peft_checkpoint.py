"""PEFT's checkpoints in our models, and our tasks in PEFT's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import transformers
from decoder_families import FAMILIES as DECODERS
from encoder_decoder_families import tiny_bart, tiny_t5
from family_checks import Family
from peft.tuners.cartridge.utils import compose_cartridge_adapters
from peft_models import FAMILIES, FROZEN, KINDS, TASKS, assert_close, config_of, of_family, peft_of_family
from safetensors.torch import load_file, save_file
from tiny_models import ONE_OF_EACH, P, batch, prepared, tiny_model, trainable
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from prefix_kernels.integrations.transformers import get_prefix_model, load_prefix_model
from prefix_kernels.integrations.transformers.config import PrefixTuningConfig
from prefix_kernels.integrations.transformers.storage import peft_checkpoint
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import read_peft_checkpoint, save_peft_checkpoint

TASKS = TASKS | {"SEQ_CLS": (AutoModelForSequenceClassification, {}), "CAUSAL_LM": (AutoModelForCausalLM, {})}


def trained(base: PreTrainedModel, config: peft.PeftConfig) -> peft.PeftModel:
    """PEFT's model with parameters as after a training: none is what it began as."""
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def stored(base: PreTrainedModel, folder: Path, kind: str = "prefix", task_type: str = "SEQ_CLS") -> peft.PeftModel:
    model = trained(base, config_of(kind, task_type))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_stored_adapter_gives_the_logits_of_peft(family: str, kind: str, tmp_path: Path) -> None:
    base = tiny_model(family)
    theirs = stored(base, tmp_path, kind)
    ours = load_prefix_model(base, tmp_path)
    assert ours is base and set(trainable(ours)) >= {"prefix_encoder.table"}
    assert ours.prefix_tuning_config.position_offset == "peft" and ours.prefix_tuning_config.window_includes_prefix
    inputs = batch(family, "left")
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("task_type", TASKS)
def test_every_task_goes_there_and_back(task_type: str, tmp_path: Path) -> None:
    """The heads too: the files are equal byte by byte, and PEFT gives the logits that it gave before."""
    base = tiny_model("bert", TASKS[task_type][0], num_labels=2 if task_type == "QUESTION_ANS" else 3)
    theirs = stored(base, tmp_path / "theirs", "projection", task_type)
    ours = load_prefix_model(copy.deepcopy(base), tmp_path / "theirs")
    save_peft_checkpoint(ours, tmp_path / "ours")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()

    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert type(loaded) is type(theirs)
    inputs = batch("bert", "right")
    for model in (ours, loaded):
        assert_close(model(**inputs)[0], theirs(**inputs)[0])


@of_family(FAMILIES)
def test_every_family_goes_there_and_back(family: Family, tmp_path: Path) -> None:
    base = family.model()
    theirs = peft_of_family(family, base)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_prefix_model(copy.deepcopy(base), tmp_path / "theirs")
    inputs = family.inputs("none")
    expected = theirs(**inputs).logits
    assert_close(ours(**inputs).logits, expected)
    save_peft_checkpoint(ours, tmp_path / "ours")
    assert_close(peft.PeftModel.from_pretrained(base, tmp_path / "ours")(**inputs).logits, expected)


def test_a_task_of_ours_gives_the_same_in_peft(tmp_path: Path) -> None:
    base = tiny_model("roberta")
    ours = prepared(base, prefix_projection=True, prefix_dropout=0.1)
    with torch.no_grad():
        for parameter in trainable(ours).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_peft_checkpoint(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    inputs = batch("roberta", "right")
    assert_close(theirs(**inputs).logits, ours(**inputs).logits)


def test_a_head_that_only_peft_trains_is_stored_too(tmp_path: Path) -> None:
    """PEFT does not load a checkpoint for a classifier without one."""
    base = tiny_model("bert")
    ours = prepared(base, modules_to_save=())
    save_peft_checkpoint(ours, tmp_path)
    inputs = batch("bert")
    assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(**inputs).logits, ours(**inputs).logits)


def test_cartridges_of_both_are_composed(tmp_path: Path) -> None:
    base = tiny_model("llama", AutoModelForCausalLM)
    stored(base, tmp_path / "theirs", "cartridge", "CAUSAL_LM")
    save_peft_checkpoint(prepared(base), tmp_path / "ours", num_frozen_tokens=1)
    compose_cartridge_adapters([tmp_path / "ours", tmp_path / "theirs"], output_path=tmp_path / "both")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both")
    assert theirs.peft_config["default"].num_frozen_tokens == 1
    ours = load_prefix_model(base, tmp_path / "both")
    config = ours.prefix_tuning_config
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (2 * P, 1)
    settings = batch("llama", "left") | {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**settings), theirs.generate(**settings))


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()


def test_a_cartridge_is_trained_as_peft_trains_it_and_goes_back(tmp_path: Path) -> None:
    """Its first tokens stay; the rest, and the file in the end, are those of PEFT."""
    base = tiny_model("llama")
    theirs = stored(base, tmp_path / "begun", "cartridge")
    ours = load_prefix_model(copy.deepcopy(base), tmp_path / "begun")
    frozen = ours.prefix_encoder.frozen_table.clone()
    assert frozen.shape[0] == ours.prefix_tuning_config.num_frozen_tokens == FROZEN
    inputs = batch("llama", "left")
    for model in (ours, theirs):
        step(model, inputs)
    assert torch.equal(ours.prefix_encoder.frozen_table, frozen)

    theirs.save_pretrained(tmp_path / "theirs")
    save_peft_checkpoint(ours, tmp_path / "ours")
    expected, tensors = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert_close(tensor, expected[name])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert loaded.peft_config["default"].num_frozen_tokens == FROZEN
    assert_close(loaded(**inputs).logits, ours(**inputs).logits)


@pytest.mark.parametrize("num_frozen_tokens", [0, 1, P])
def test_a_given_config_chooses_how_much_of_a_cartridge_is_frozen(num_frozen_tokens: int, tmp_path: Path) -> None:
    base = tiny_model("bert")
    theirs = stored(base, tmp_path / "theirs", "cartridge")
    config = PrefixTuningConfig(P, num_frozen_tokens=num_frozen_tokens)
    ours = load_prefix_model(base, tmp_path / "theirs", config=config)
    assert ours.prefix_encoder.table.shape[0] == P - num_frozen_tokens
    inputs = batch("bert", "left")
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    save_peft_checkpoint(ours, tmp_path / "ours")
    kinds = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert kinds["peft_type"] == ("CARTRIDGE" if num_frozen_tokens else "PREFIX_TUNING")


def test_the_older_file_of_weights_is_read(tmp_path: Path) -> None:
    base = tiny_model("bert")
    theirs = trained(base, config_of("prefix"))
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    inputs = batch("bert")
    assert_close(load_prefix_model(base, tmp_path)(**inputs).logits, theirs(**inputs).logits)


def test_a_given_config_chooses_how_the_adapter_runs(tmp_path: Path) -> None:
    base = tiny_model("bert")
    theirs = stored(base, tmp_path)
    config = PrefixTuningConfig(num_virtual_tokens=P, attention="torch", inference_mode=True)
    ours = load_prefix_model(base, tmp_path, config=config)
    assert not trainable(ours) and ours.prefix_tuning_config.attention == "torch"
    inputs = batch("bert", "left")
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)


def test_a_bfloat16_model_takes_a_float32_adapter(tmp_path: Path) -> None:
    base = tiny_model("bert")
    theirs = stored(base, tmp_path)
    ours = load_prefix_model(base.to(torch.bfloat16), tmp_path)
    assert ours.prefix_encoder.table.dtype == torch.float32 and ours.classifier.weight.dtype == torch.bfloat16
    inputs = batch("bert")
    expected = theirs(**inputs).logits
    assert (ours(**inputs).logits - expected).abs().max() < 0.1 * expected.abs().max()


def change_config(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    changed = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: change_config(folder, peft_type="LORA"), "type PREFIX_TUNING or CARTRIDGE, got LORA"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "expected adapter_model.safetensors or adapter_model.bin in it, got neither",
        ),
        (
            lambda folder: change_tensors(folder, prompt_embeddings=None),
            r"expected a tensor 'prompt_embeddings', got \['base_model.classifier.bias'",
        ),
        (
            lambda folder: change_tensors(folder, prompt_embeddings=torch.zeros(P, 64)),
            r"prompt_embeddings: expected \[P, 128\] \(a key and a value of 4 heads of 8 for each of 2 layers\)",
        ),
        (
            lambda folder: change_tensors(folder, base_model__pooler__weight=torch.zeros(2)),
            r"modules_to_save, \['classifier', .* has them, got 'base_model.pooler.weight'",
        ),
        (
            lambda folder: change_tensors(folder, base_model__classifier__weight=torch.zeros(2, 32)),
            r"classifier.weight: expected shape \[3, 32\], got \[2, 32\]",
        ),
        (lambda folder: change_tensors(folder, base_model__classifier__bias=None), "missing: classifier.bias"),
        (
            lambda folder: change_config(folder, num_transformer_submodules=2),
            "expected num_transformer_submodules=1, .* models like BertForSequenceClassification, got 2",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    base = tiny_model("bert")
    stored(base, tmp_path)
    damage(tmp_path)
    inputs = batch("bert")
    before = base(**inputs).logits
    with pytest.raises(ValueError, match=message):
        load_prefix_model(base, tmp_path)
    assert not hasattr(base, "prefix_encoder") and torch.equal(base(**inputs).logits, before)


def test_a_folder_that_peft_did_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder of PEFT, with adapter_config.json, got none"):
        read_peft_checkpoint(tmp_path, tiny_model("bert"))
    with pytest.raises(TypeError, match="expected a transformers.PreTrainedModel, got Linear"):
        read_peft_checkpoint(tmp_path, nn.Linear(2, 2))


def tiny_distilbert() -> PreTrainedModel:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": 99}
    config = transformers.AutoConfig.for_model("distilbert", **sizes)
    return AutoModelForSequenceClassification.from_config(config)


def sliding() -> PreTrainedModel:
    return next(family for family in DECODERS if family.name == "mistral").model()


def with_prefix(base: PreTrainedModel, **settings: object) -> PreTrainedModel:
    return get_prefix_model(base, PrefixTuningConfig(**({"num_virtual_tokens": P} | settings)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny_model("bert"), "prepared by get_prefix_model, got a plain BertForSequenceClassification"),
        (
            lambda: with_prefix(tiny_model("bert"), position_offset="none"),
            "position_offset: expected 'peft' .*got 'none'",
        ),
        (
            lambda: with_prefix(tiny_model("bert"), num_virtual_tokens=[2, 3], position_offset="none"),
            "position_offset: expected 'peft' .*got 'none'",
        ),
        (lambda: with_prefix(tiny_model("bert"), layers=[1]), r"layers: expected all 2 layers, .*got \[1\]"),
        (lambda: with_prefix(sliding()), "window_includes_prefix: expected True .*MistralForCausalLM.*got False"),
        (
            lambda: with_prefix(tiny_bart()),
            r"target_attentions: expected \['decoder'\], .*got \['cross', 'decoder', 'encoder'\]",
        ),
        (lambda: with_prefix(tiny_bart(), target_attentions=["encoder"]), r"expected \['decoder'\].*got \['encoder'\]"),
        (
            lambda: with_prefix(tiny_t5(num_layers=2), target_attentions=["decoder"]),
            r"PEFT gives layers \[0, 1\] of this model one prefix, expected them to be equal",
        ),
        (lambda: with_prefix(tiny_distilbert()), "DistilBertForSequenceClassification: PEFT cannot run a prefix on it"),
        (
            lambda: with_prefix(tiny_model("bert", transformers.AutoModelForMaskedLM)),
            "BertForMaskedLM: expected a model for a task that PEFT has, SEQ_CLS, TOKEN_CLS",
        ),
    ],
)
def test_what_peft_cannot_say_or_run_is_not_stored(
    build: Callable[[], PreTrainedModel], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_peft_checkpoint(build(), tmp_path / "task")
    assert not (tmp_path / "task").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": "MASKED_LM"}, "task_type: expected one of SEQ_CLS, TOKEN_CLS, .*got 'MASKED_LM'"),
        ({"num_frozen_tokens": P + 1}, "num_frozen_tokens: expected 0 to 5, got 6"),
    ],
)
def test_bad_settings_of_a_checkpoint_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_peft_checkpoint(prepared(tiny_model("bert")), tmp_path, **settings)


FILES = ["adapter_config.json", "adapter_model.safetensors"]


def test_threads_that_save_to_one_folder_leave_two_whole_files(tmp_path: Path) -> None:
    models = [prepared(tiny_model("bert")) for _ in range(6)]

    def save_often(model: PreTrainedModel) -> None:
        for _ in range(5):
            save_peft_checkpoint(model, tmp_path / "task")

    with ThreadPoolExecutor(len(models)) as threads:
        list(threads.map(save_often, models))
    assert sorted(file.name for file in (tmp_path / "task").iterdir()) == FILES
    stored_table = load_prefix_model(tiny_model("bert"), tmp_path / "task").prefix_encoder.table
    assert sum(torch.equal(stored_table, model.prefix_encoder.table) for model in models) == 1


@pytest.mark.parametrize("failing", FILES)
def test_a_save_that_fails_leaves_the_old_files_and_no_others(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_peft_checkpoint(prepared(tiny_model("bert")), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        next(arg for arg in args if isinstance(arg, Path)).write_bytes(b"half")
        raise OSError("disk full")

    if failing == FILES[0]:
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(peft_checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_peft_checkpoint(prepared(tiny_model("bert")), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_symbolic_links_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    for name in FILES:
        (tmp_path / "task" / name).symlink_to(tmp_path / name)
    save_peft_checkpoint(prepared(tiny_model("bert")), tmp_path / "task")
    for name in FILES:
        assert (tmp_path / "task" / name).is_symlink() and not (tmp_path / name).is_symlink()
    load_prefix_model(tiny_model("bert"), tmp_path / "task")
