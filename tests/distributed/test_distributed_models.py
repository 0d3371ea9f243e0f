"""Models of Transformers and PEFT on two processes: losses, gradients, files and tasks are those of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)
from two_processes import WORLD, assert_gradients_of_one, own_rows, run_on_two_processes

from prefix_kernels import load_prefix, prefix_state_dict
from prefix_kernels.integrations.peft import accelerate, restore
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_named_prefix,
    get_prefix_model,
    initialize_from_prefix,
    initialize_from_text,
    initialize_like_keys,
    load_named_prefix,
    load_prefix_model,
    save_prefix_model,
    select_prefixes,
    set_prefix,
)
from prefix_kernels.integrations.transformers.storage.peft_checkpoint import save_peft_checkpoint

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(28).view(4, 7) + 3
LABELS = torch.tensor([0, 1, 1, 0])
# What each row sees: one task, another, both one after another, none.
NAMES = ["default", "second", ["second", "default"], None]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = BertConfig(**SIZES, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def own(folder: Path, name: str) -> Path:
    """A path of this process alone."""
    return folder / f"{name} of process {dist.get_rank()}"


def same_draws(seed: int) -> None:
    """What is drawn from now on is the same in both processes."""
    torch.manual_seed(seed)


def assert_same_logits(model: nn.Module, whole: nn.Module, rows: slice = slice(None), **inputs: object) -> None:
    with torch.no_grad():
        expected = whole.eval()(IDS, **inputs).logits
        torch.testing.assert_close(model.eval()(IDS[rows], **inputs).logits, expected[rows], rtol=1e-4, atol=1e-5)


def sharded(model: PreTrainedModel, layers: nn.ModuleList) -> PreTrainedModel:
    for unit in [*layers, model]:
        fully_shard(unit, mesh=init_device_mesh("cpu", (WORLD,)))
    return model


def check_fsdp2(folder: Path) -> None:
    def base() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(folder)

    rows = own_rows(4)
    # Part of the model's unit, or a unit of its own whose parameters are gone, or stay gathered, after its forward.
    own_units = ({"reshard_after_forward": True}, {"reshard_after_forward": False})
    for projection, unit in [(False, None), (True, None), *zip((False, True), own_units, strict=True)]:
        same_draws(1)
        whole = get_prefix_model(base(), PrefixTuningConfig(5, prefix_projection=projection))
        model = copy.deepcopy(whole)
        if unit is not None:
            fully_shard(model.prefix_encoder, mesh=init_device_mesh("cpu", (WORLD,)), **unit)
        sharded(model, model.bert.encoder.layer)

        losses = [whole(IDS, labels=LABELS).loss, model(IDS[rows], labels=LABELS[rows]).loss]
        for loss in losses:
            loss.backward()
        assert_gradients_of_one(model, whole)

        for fold in (False, True):
            save_prefix_model(model, own(folder, "task"), fold=fold)
            assert_same_logits(load_prefix_model(base(), own(folder, "task")), whole)

        # Also into a model whose parameters a forward pass has left gathered, and until the next step and beyond.
        assert_same_logits(model, whole, rows)
        other = {name: tensor + 0.5 for name, tensor in prefix_state_dict(whole).items()}
        for one in (model, whole):
            load_prefix(one, other)
        model(IDS[rows]).logits.sum().backward()
        assert_same_logits(model, whole, rows)
        if projection:
            with pytest.raises(ValueError, match="fold: expected parameters that every process holds whole"):
                load_prefix(model, own(folder, "task"))
            model(IDS[rows])
            if unit is None:
                model.reshard()
            with pytest.raises(ValueError, match="fold: expected parameters that every process holds whole"):
                model.prefix_encoder.fold()

        with pytest.raises(ValueError, match="model: expected one that this process holds whole, .* save_prefix_model"):
            save_peft_checkpoint(model, own(folder, "adapter"))
        check_initialization_refused(model, whole)

    check_tasks_loaded_before_sharding(folder, base)
    with pytest.raises(ValueError, match="model: expected one that is not sharded yet, got one of fully_shard"):
        get_prefix_model(fully_shard(base()))


def check_initialization_refused(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    text = "{}: expected one that is not sharded, got one of fully_shard; initialize the prefix before"
    with pytest.raises(ValueError, match=text.format("model")):
        initialize_from_text(model, IDS[0])
    with pytest.raises(ValueError, match=text.format("model")):
        initialize_from_prefix(model, whole)
    with pytest.raises(ValueError, match=text.format("model")):
        initialize_like_keys(model, input_ids=IDS)
    with pytest.raises(ValueError, match=text.format("source")):
        initialize_from_prefix(whole, model)


def check_tasks_loaded_before_sharding(folder: Path, base: Callable[[], PreTrainedModel]) -> None:
    whole = get_prefix_model(base(), PrefixTuningConfig(5))
    save_prefix_model(whole, own(folder, "second"))
    nn.init.normal_(whole.prefix_encoder.table)
    load_named_prefix(whole, "second", own(folder, "second"))
    model = copy.deepcopy(whole)
    sharded(model, model.bert.encoder.layer)
    # The processes' batches name different tasks.
    names = NAMES[own_rows(4)]
    with torch.no_grad():
        logits = model(IDS[own_rows(4)], prefix_names=names).logits
        torch.testing.assert_close(logits, whole(IDS, prefix_names=NAMES).logits[own_rows(4)])
    refused = pytest.raises(ValueError, match="model: expected one that is not sharded, got one of fully_shard")
    with refused:
        set_prefix(model, "second")
    with refused:
        load_named_prefix(model, "third", own(folder, "second"))


def test_fsdp2_trains_saves_and_loads_the_task_of_one_process(bert: Path, tmp_path: Path) -> None:
    run_on_two_processes(check_fsdp2, tmp_path, bert)


def peft_model(folder: Path, **options: object) -> peft.PeftModel:
    same_draws(1)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, **options), config)


def with_unit(model: nn.Module, unit: Callable[[nn.Module], nn.Module]) -> nn.Module:
    fully_shard(unit(model))
    return model


def check_accelerated_peft(folder: Path) -> None:
    rows = own_rows(4)
    for how in ("ddp", "fsdp"):
        # PEFT itself, in one process.
        whole, accelerated = peft_model(folder), accelerate(peft_model(folder))
        if how == "ddp":
            model = nn.parallel.DistributedDataParallel(accelerated)
        else:
            model = sharded(accelerated, accelerated.base_model.model.layers)
        losses = [whole(IDS, labels=IDS).loss, model(input_ids=IDS[rows], labels=IDS[rows]).loss]
        for loss in losses:
            loss.backward()
        assert_gradients_of_one(model, whole)

        # PEFT's save_pretrained does not read a sharded prefix.
        saved = accelerated
        if how == "fsdp":
            saved = accelerate(peft_model(folder))
            saved.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        saved.save_pretrained(own(folder, "adapter"))
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), own(folder, "adapter"))
        assert_same_logits(accelerate(loaded), whole)

    for unit in (lambda model: model, lambda model: model.base_model.lm_head):
        with pytest.raises(ValueError, match="peft_model: expected one that is not sharded, got one of fully_shard"):
            restore(with_unit(accelerate(peft_model(folder)), unit))
        refused = "peft_model: expected one that is not sharded yet, got one of fully_shard"
        with pytest.raises(ValueError, match=refused):
            accelerate(with_unit(peft_model(folder), unit))
    with pytest.raises(ValueError, match=r"peft_model: expected a model whose heads are not divided .* \(tp_plan\)"):
        accelerate(peft_model(folder, tp_plan="auto"))


def test_an_accelerated_peft_model_trains_under_ddp_and_fsdp2_as_peft_does_alone(llama: Path, tmp_path: Path) -> None:
    run_on_two_processes(check_accelerated_peft, tmp_path, llama)


def check_tensor_parallel(folder: Path) -> None:
    def base(**options: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, **options)

    for projection in (False, True):
        torch.manual_seed(dist.get_rank())  # the processes need not draw the same initial prefix
        split = get_prefix_model(base(tp_plan="auto"), PrefixTuningConfig(5, prefix_projection=projection))
        assert projection or split.prefix_encoder.table.to_local().shape == (5, 4, 1, 8)
        save_prefix_model(split, own(folder, "task"), fold=False)
        whole = load_prefix_model(base(), own(folder, "task"))
        losses = [model(IDS, labels=IDS).loss for model in (whole, split)]
        torch.testing.assert_close(losses[1], losses[0])
        for loss in losses:
            loss.backward()
        assert_task_gradients_of_one(split.prefix_encoder, whole.prefix_encoder)

        with pytest.raises(ValueError, match="model: expected one that this process holds whole, .* save_prefix_model"):
            save_peft_checkpoint(split, own(folder, "adapter"))
        save_prefix_model(split, own(folder, "folded"))
        for model in (load_prefix_model(base(), own(folder, "folded")), split.prefix_encoder.fold() and split):
            assert_same_logits(model, whole)

    check_initial_prefixes(folder, base)
    check_tasks_of_divided_heads(folder, base)


def check_initial_prefixes(folder: Path, base: Callable[..., PreTrainedModel]) -> None:
    whole, split = (get_prefix_model(base(**options), PrefixTuningConfig(5)) for options in ({}, {"tp_plan": "auto"}))
    for model in (whole, split):
        initialize_from_text(model, IDS[0])
    assert_same_logits(split, whole)
    same_draws(2)
    save_prefix_model(get_prefix_model(base(), PrefixTuningConfig(3)), own(folder, "shorter"))
    for model in (whole, split):
        initialize_from_prefix(model, own(folder, "shorter"))
    assert_same_logits(split, whole)
    initialize_like_keys(split, input_ids=IDS)
    save_prefix_model(split, own(folder, "noise"))
    assert_same_logits(load_prefix_model(base(), own(folder, "noise")), split)


def assert_task_gradients_of_one(encoder: nn.Module, whole: nn.Module) -> None:
    assert [name for name, _ in encoder.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert_gradients_of_one(encoder, whole)


def check_tasks_of_divided_heads(folder: Path, base: Callable[..., PreTrainedModel]) -> None:
    for name, length, projection in (("first", 5, False), ("second", 3, True)):
        same_draws(length)
        task = get_prefix_model(base(), PrefixTuningConfig(length, prefix_projection=projection))
        save_prefix_model(task, own(folder, name), fold=False)
    whole, split = base(), base(tp_plan="auto")
    for model in (whole, split):
        load_prefix_model(model, own(folder, "first"))
        load_named_prefix(model, "second", own(folder, "second"), is_trainable=True)
        model(IDS, prefix_names=NAMES).logits.square().mean().backward()
    for name in ("default", "second"):
        assert_task_gradients_of_one(get_named_prefix(split, name), get_named_prefix(whole, name))

    # Frozen ones are seen as they are after each of them was written to.
    for model in (whole, split):
        for name in ("default", "second"):
            get_named_prefix(model, name).requires_grad_(False)
    for state in (
        prefix_state_dict(whole),
        {"prefix_encoder.table": torch.linspace(-9, 9, 320).cos().view(5, 4, 2, 8)},
    ):
        for model in (whole, split):
            load_prefix(model, state)
        for _ in range(2):
            assert_same_logits(split, whole, prefix_names=NAMES)
    with torch.no_grad():
        by_selection = split(IDS, prefix_names=select_prefixes(split, NAMES)).logits
        torch.testing.assert_close(by_selection, split(IDS, prefix_names=NAMES).logits)
    beams = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "prefix_names": NAMES}
    assert torch.equal(split.generate(IDS, **beams), whole.generate(IDS, **beams))

    for name in ("second", "default"):
        for model in (whole, split):
            set_prefix(model, name)
        assert_same_logits(split, whole)
        save_prefix_model(split, own(folder, "saved"))
        assert_same_logits(load_prefix_model(base(), own(folder, "saved")), whole)

    with_head = get_prefix_model(base(tp_plan="auto"), PrefixTuningConfig(5, modules_to_save=["lm_head"]))
    save_prefix_model(with_head, own(folder, "head"))
    with pytest.raises(ValueError, match="lm_head: expected a head that each process holds whole, got one divided"):
        load_named_prefix(with_head, "second", own(folder, "head"))


def test_a_transformer_under_its_tensor_parallel_plan_has_the_tasks_of_one_process(llama: Path, tmp_path: Path) -> None:
    run_on_two_processes(check_tensor_parallel, tmp_path, llama)
