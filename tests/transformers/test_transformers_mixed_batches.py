"""The bank of a mixed batch: what is in it, how long it is held, and which row names which of its entries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from encoder_decoder_families import T5, WHISPER
from family_checks import prepared as prepared_family
from named_tasks import NAMES, Tasks, row_by_row
from tiny_models import batch, prepared, tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput
from two_processes import WORLD, run_on_two_processes

import prefix_kernels.integrations.transformers.attention.interface as attention_module
import prefix_kernels.integrations.transformers.tasks.registry as tasks_module
from prefix_kernels.integrations.transformers import (
    delete_named_prefix,
    get_named_prefix,
    load_named_prefix,
    save_prefix_model,
    select_prefixes,
    set_prefix,
    use_prefixes,
)
from prefix_kernels.integrations.transformers.runtime.bank import PrefixBank


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path, tiny_model("llama", AutoModelForCausalLM))


@pytest.fixture
def frozen(tasks: Tasks) -> Tasks:
    tasks.model.requires_grad_(False)
    return tasks


@pytest.fixture
def banks(monkeypatch: pytest.MonkeyPatch) -> list[PrefixBank]:
    """The banks in the order in which they are stacked."""
    stack_prefixes, made = tasks_module.stack_prefixes, []

    def spy(prefixes: Sequence[Mapping[int, tuple[Tensor, Tensor]]]) -> PrefixBank:
        made.append(stack_prefixes(prefixes))
        return made[-1]

    monkeypatch.setattr(tasks_module, "stack_prefixes", spy)
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The bank's keys, the ids and the lengths of each launch."""
    calls, plain = [], attention_module.prefix_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append((args[3], kwargs["prefix_ids"], kwargs["prefix_lens"]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention_module, "prefix_attention", spy)
    return calls


def size(bank: PrefixBank) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for pair in bank.pairs.values() for x in pair)


def test_a_mixed_batch_is_one_launch_per_layer_over_a_bank_of_the_tasks_that_it_names(
    tasks: Tasks, launches: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    model, inputs = tasks.model, batch("llama")
    model(**inputs, prefix_names=NAMES)
    model(**inputs, prefix_names=["short"] * 3)
    assert len(launches) == 4, "two layers, twice"
    for bank, ids, lens in launches[:2]:
        assert bank.shape == (2, 2, 7, 8) and ids.tolist() == [0, -1, 1] and lens.tolist() == [2, 7]
    for bank, ids, lens in launches[2:]:
        assert bank.shape == (1, 2, 2, 8) and ids.tolist() == [0, 0, 0] and lens.tolist() == [2]


def test_a_long_prefix_takes_no_memory_in_batches_that_do_not_name_it(tmp_path: Path, banks: list[PrefixBank]) -> None:
    base = tiny_model("llama", AutoModelForCausalLM)
    model = prepared(base, num_virtual_tokens=400)
    save_prefix_model(prepared(base, num_virtual_tokens=2), tmp_path / "short")
    for i in range(31):
        load_named_prefix(model, str(i), tmp_path / "short")
    inputs = {"input_ids": torch.randint(3, 97, (4, 6))}
    long, short = (get_named_prefix(model, name).table.numel() * 4 for name in ("default", "0"))
    with torch.no_grad():
        for names, expected in (
            (["3"] * 4, short),
            (["3", "4", None, "3"], 2 * short),
            ([None] * 4, short // 2),
            (["default"] * 4, long),
        ):
            model(**inputs, prefix_names=names)
            assert [size(bank) for bank in banks] == [expected]
            banks.clear()
            select_prefixes(model, names)
            assert [size(bank) for bank in banks] == [expected]
            banks.clear()


def test_rows_without_any_prefix_give_what_the_base_gives(tasks: Tasks) -> None:
    inputs = batch("llama", "left")
    seen = inputs["attention_mask"].bool()
    logits, expected = tasks.model(**inputs, prefix_names=[None] * 3).logits, tasks.base(**inputs).logits
    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", [lambda table: table.data.mul_(3), lambda table: table.mul_(3)], ids=["data", "op"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_frozen_prefix_that_is_written_to_is_seen_as_it_is_now(
    frozen: Tasks, mode: Callable, write: Callable[[Tensor], Tensor]
) -> None:
    model, inputs = frozen.model, batch("llama")
    with mode():
        before = model(**inputs, prefix_names=NAMES).logits
        for table in (get_named_prefix(model, "short").table, frozen.alone["short"].prefix_encoder.table):
            with torch.no_grad():
                write(table)
        after, expected = model(**inputs, prefix_names=NAMES).logits, row_by_row(frozen, NAMES, inputs)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-2)


def test_a_frozen_prefix_made_in_inference_mode_is_seen_as_it_is_now(frozen: Tasks) -> None:
    model, inputs = frozen.model, batch("llama")
    with torch.inference_mode():
        table = get_named_prefix(model, "short").table = nn.Parameter(torch.randn(2, 4, 2, 8), requires_grad=False)
        before = model(**inputs, prefix_names=NAMES).logits
        table.mul_(3)
        after = model(**inputs, prefix_names=NAMES).logits
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(model(**inputs, prefix_names=select_prefixes(model, NAMES)).logits, after)


@pytest.mark.parametrize("trainable", [False, True])
def test_generate_stacks_its_bank_once_and_a_selection_not_again(
    tasks: Tasks, banks: list[PrefixBank], trainable: bool
) -> None:
    model, inputs = tasks.model.requires_grad_(trainable), batch("llama", "left")
    get_named_prefix(model, "short").requires_grad_(trainable)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(**inputs, **settings, prefix_names=["short", "default", None])
    assert len(banks) == 1
    with use_prefixes(model, ["short", "default", None]):
        assert torch.equal(model.generate(**inputs, **settings), tokens)
    assert len(banks) == 2
    with torch.no_grad():
        selection = select_prefixes(model, ["short", "default", None])
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **settings, prefix_names=selection), tokens)
            model(**inputs, prefix_names=selection)
    assert len(banks) == 3


def check_sharded_tasks(folder: Path) -> None:
    torch.manual_seed(0)  # the same in both processes
    whole = Tasks(folder / str(dist.get_rank()), tiny_model("llama", AutoModelForCausalLM)).model
    model, inputs = copy.deepcopy(whole), batch("llama", "left")
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    names = ["short", "default", None]
    settings = {"max_new_tokens": 3, "do_sample": False}
    expected = whole.generate(**inputs, **settings, prefix_names=names)
    assert torch.equal(model.generate(**inputs, **settings, prefix_names=names), expected)
    with torch.no_grad():
        selection = select_prefixes(model, names)
    assert torch.equal(model.generate(**inputs, **settings, prefix_names=selection), expected)


def test_a_sharded_model_makes_its_bank_while_its_parameters_are_there(tmp_path: Path) -> None:
    for rank in range(WORLD):
        (tmp_path / str(rank)).mkdir()
    run_on_two_processes(check_sharded_tasks, tmp_path, tmp_path)


@pytest.mark.parametrize("names", [NAMES, [["short", "default"], None, ["unmoved"]]], ids=["one each", "combined"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inference_mode_leaves_nothing_behind_that_training_could_not_use(
    family: str, names: list, tmp_path: Path
) -> None:
    tasks = Tasks(tmp_path, tiny_model(family, AutoModelForCausalLM))
    model, inputs = tasks.model, batch(family)
    model.prefix_encoder.requires_grad_(False)
    # Gradients that pass through the attentions, which keep the bank for them.
    embeddings = model.get_input_embeddings().requires_grad_(True)

    def gradients(names: object) -> Tensor:
        logits = model(**inputs, prefix_names=names).logits
        return torch.autograd.grad(logits.square().mean(), embeddings.weight)[0]

    expected = gradients(names)
    with torch.inference_mode():
        model(**inputs, prefix_names=names)
        model.generate(**inputs, prefix_names=names, max_new_tokens=2)
        selection, opened = select_prefixes(model, names), use_prefixes(model, names)
    torch.testing.assert_close(gradients(names), expected)
    torch.testing.assert_close(gradients(selection), expected)
    with opened:
        torch.testing.assert_close(gradients(None), expected)


@pytest.mark.parametrize("held", [False, True], ids=["stacked by each call", "held"])
@pytest.mark.parametrize("again", [False, True], ids=["deleted", "replaced"])
def test_a_selection_of_a_task_that_was_deleted_is_refused_and_others_are_not(
    tasks: Tasks, held: bool, again: bool
) -> None:
    model, inputs = tasks.model, batch("llama")
    with torch.set_grad_enabled(not held):
        gone = select_prefixes(model, ["short", "default", None])
        stays = select_prefixes(model, ["unmoved", "default", None])
    assert (gone.banks is not None) is held
    expected = model(**inputs, prefix_names=stays).logits
    opened = use_prefixes(model, gone)
    delete_named_prefix(model, "short")
    message = "prefix_names: expected a selection of tasks that the model still has, got one with 'short', which was "
    if again:
        load_named_prefix(model, "short", tasks.path("default"))
        message += "deleted after the selection was made; its name is that of another task by now: "
    for call in (model, model.base_model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs, prefix_names=gone)
    with opened, pytest.raises(ValueError, match=message):
        model(**inputs)
    assert torch.equal(model(**inputs, prefix_names=stays).logits, expected)


def test_a_selection_of_a_deleted_task_does_not_keep_its_memory(tasks: Tasks) -> None:
    selection = select_prefixes(tasks.model, ["short", "default", None])
    delete_named_prefix(tasks.model, "short")
    assert [task.encoder for task in selection.bank_tasks] == [None, None]


def test_a_selection_is_compared_with_the_heads_that_are_active_now(tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, tiny_model("bert"))
    nn.init.normal_(tasks.alone["short"].classifier.weight)
    save_prefix_model(tasks.alone["short"], tasks.path("other"))
    model, inputs = tasks.model, batch("bert")
    load_named_prefix(model, "other", tasks.path("other"))
    selection = select_prefixes(model, ["default", "unmoved", None])
    expected = model(**inputs, prefix_names=selection).logits
    set_prefix(model, "unmoved")
    torch.testing.assert_close(model(**inputs, prefix_names=selection).logits, expected)
    set_prefix(model, "other")
    with pytest.raises(ValueError, match="'default' has another 'classifier' than the active task 'other'"):
        model(**inputs, prefix_names=selection)


def test_the_backbone_refuses_a_selection_of_another_model(tasks: Tasks) -> None:
    selection = select_prefixes(copy.deepcopy(tasks.model), NAMES)
    with pytest.raises(ValueError, match="expected a selection made for this model, got one made for another"):
        tasks.model.base_model(**batch("llama"), prefix_names=selection)


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 4}], ids=str)
@pytest.mark.parametrize("names", [["short"], ["short", "unmoved"], ["short"] * 8, []], ids=len)
def test_generate_wants_one_name_for_each_row_of_its_inputs(
    tasks: Tasks, names: list[str], search: dict[str, object]
) -> None:
    model, ids = tasks.model, torch.randint(3, 97, (4, 5))
    message = f"prefix_names: expected one entry for each of the 4 rows of generate's inputs, got {len(names)}"
    embeddings = model.get_input_embeddings()(ids).detach()
    settings = search | {"max_new_tokens": 2}
    for args, inputs in (
        ((ids,), {}),
        ((), {"inputs": ids}),
        ((), {"input_ids": ids}),
        ((), {"inputs_embeds": embeddings}),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(*args, **inputs, **settings, prefix_names=names)
        with pytest.raises(ValueError, match=message):
            model.generate(*args, **inputs, **settings, prefix_names=select_prefixes(model, names))
        with pytest.raises(ValueError, match=message), use_prefixes(model, names):
            model.generate(*args, **inputs, **settings)
        per_row = search.get("num_return_sequences", 1)
        assert len(model.generate(*args, **inputs, **settings, prefix_names=["short"] * 4)) == 4 * per_row


def test_generate_from_nothing_has_one_row(tasks: Tasks) -> None:
    model, settings = tasks.model, {"bos_token_id": 1, "max_new_tokens": 3, "eos_token_id": None}
    assert len(model.generate(**settings, prefix_names=["short"])) == 1
    assert len(model.generate(**settings, prefix_names=["short"], num_beams=2, num_return_sequences=2)) == 2
    with pytest.raises(ValueError, match="expected one entry for each of the 1 rows of generate's inputs, got 2"):
        model.generate(**settings, prefix_names=["short", None])
    mask = torch.ones(3, 1, dtype=torch.long)
    assert len(model.generate(**settings, attention_mask=mask, prefix_names=NAMES)) == 3
    stop = torch.tensor([95, 96])
    assert len(model.generate(**settings | {"eos_token_id": stop}, prefix_names=["short"])) == 1


def test_guidance_and_an_assistant_run_on_the_rows_of_the_inputs(tasks: Tasks) -> None:
    inputs, settings = batch("llama", "left"), {"max_new_tokens": 5, "do_sample": False}
    guided = tasks.model.generate(**inputs, **settings, guidance_scale=1.5, num_beams=2, prefix_names=["short"] * 3)
    expected = tasks.alone["short"].generate(**inputs, **settings, guidance_scale=1.5, num_beams=2)
    assert torch.equal(guided, expected)
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    expected = tasks.alone["short"].generate(**one, **settings)
    for assistant in (tasks.base, tasks.alone["unmoved"], tasks.model):
        tokens = tasks.model.generate(**one, **settings, assistant_model=assistant, prefix_names=["short"])
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("family", [T5, WHISPER], ids=lambda family: family.name)
def test_the_encoder_s_input_or_output_says_how_many_rows_there_are(family: object, tmp_path: Path) -> None:
    base = family.model()
    model = prepared_family(family, base)
    save_prefix_model(prepared_family(family, base, num_virtual_tokens=2), tmp_path / "short")
    load_named_prefix(model, "short", tmp_path / "short")
    inputs = {name: tensor for name, tensor in family.inputs("none").items() if "decoder" not in name}
    settings = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    names = ["short", None, "default"]
    tokens = model.generate(**inputs, **settings, prefix_names=names)
    with torch.no_grad():
        encoded = model.get_encoder()(**inputs, prefix_names=names).last_hidden_state

    def outputs() -> dict[str, BaseModelOutput]:
        return {"encoder_outputs": BaseModelOutput(encoded)}  # which generate expands in place

    assert torch.equal(model.generate(**outputs(), **settings, prefix_names=names), tokens)
    for given in (inputs, outputs()):
        with pytest.raises(ValueError, match="expected one entry for each of the 3 rows of generate's inputs, got 1"):
            model.generate(**given, **settings, prefix_names=["short"])


def test_beams_laid_out_by_the_caller_share_an_entry(tasks: Tasks) -> None:
    inputs = batch("llama")
    twice = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in inputs.items()}
    expected = tasks.model(**twice, prefix_names=[name for name in NAMES for _ in range(2)]).logits
    with use_prefixes(tasks.model, NAMES):
        torch.testing.assert_close(tasks.model(**twice).logits, expected)
    message = "prefix_names: expected one entry for each, or for each equal group, of the 3 rows of the batch, got 2"
    with use_prefixes(tasks.model, ["short"] * 2), pytest.raises(ValueError, match=message):
        tasks.model(**inputs)
