"""Batches of an encoder-decoder model whose rows see different prefixes, and so have different positions."""

from __future__ import annotations

import copy
import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from encoder_decoder_families import BART, FAMILIES, T5, TALKATIVE, WHISPER, each_family, with_depths
from family_checks import Family, P, check_mixed_batch, prepared, trainable
from torch import Tensor
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers import (
    get_named_prefix,
    load_named_prefix,
    load_prefix_model,
    save_prefix_model,
    select_prefixes,
    set_prefix,
    use_prefixes,
)

# "default" is what the first is called; "unmoved" leaves the row's positions where they are.
TASKS = {
    "default": {"num_virtual_tokens": P},
    "short": {"num_virtual_tokens": 2},
    "unmoved": {"num_virtual_tokens": 3, "position_offset": "none"},
}
NAMES = ["short", None, "unmoved"]
each_attention = pytest.mark.parametrize("attention", ["prefix_kernels", "torch"])


class Tasks:
    """A base model, a model with each task alone, and one model with all of them."""

    def __init__(self, folder: Path, family: Family, base: PreTrainedModel, **settings: object) -> None:
        self.base = base
        self.alone = {name: prepared(family, base, **settings, **own) for name, own in TASKS.items()}
        for name, model in self.alone.items():
            save_prefix_model(model, folder / name)
        self.model = load_prefix_model(copy.deepcopy(base), folder / "default")
        for name in list(TASKS)[1:]:
            load_named_prefix(self.model, name, folder / name)

    def of(self, name: str | None) -> PreTrainedModel:
        return self.base if name is None else self.alone[name]


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: tensor[i : i + 1] for name, tensor in inputs.items()}


def assert_row(logits: Tensor, inputs: dict[str, Tensor], i: int, expected: PreTrainedModel) -> None:
    """Row ``i`` of ``logits`` where it is not padding is what ``expected`` gives for it alone."""
    alone = expected(**row(inputs, i)).logits[0]
    mask = inputs.get("decoder_attention_mask")
    valid = slice(None) if mask is None else mask[i].bool()
    torch.testing.assert_close(logits[i][valid], alone[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position_offset", ["peft", "none"])
@each_attention
@each_family
def test_rows_of_a_batch_see_the_prefixes_that_they_name(
    family: Family, attention: str, position_offset: str, tmp_path: Path
) -> None:
    settings = {"attention": attention, "position_offset": position_offset}
    check_mixed_batch(dataclasses.replace(family, settings=settings), tmp_path)


@pytest.mark.parametrize("targets", [["decoder"], ["encoder", "cross"], None], ids=str)
@each_attention
@each_family
def test_tasks_that_move_positions_are_mixed_with_those_that_do_not(
    family: Family, attention: str, targets: list[str] | None, tmp_path: Path
) -> None:
    tasks = Tasks(tmp_path, family, family.model(), attention=attention, target_attentions=targets)
    for padding in family.paddings:
        inputs = family.inputs(padding)
        with torch.no_grad():
            logits = tasks.model(**inputs, prefix_names=NAMES).logits
            for i, name in enumerate(NAMES):
                assert_row(logits, inputs, i, tasks.of(name))
    assert not torch.allclose(logits, tasks.model(**inputs).logits, atol=1e-2), "the tasks differ"


@each_attention
@each_family
def test_prefixes_combined_in_a_row_take_the_positions_of_their_sum(
    family: Family, attention: str, tmp_path: Path
) -> None:
    base = family.model()
    tasks = Tasks(tmp_path, family, base, attention=attention)
    joined = prepared(family, base, attention=attention, num_virtual_tokens=P + 2)
    with torch.no_grad():
        for role, encoder in joined.prefix_encoder.items():
            parts = [tasks.alone[name].prefix_encoder[role].table for name in ("short", "default")]
            encoder.table.copy_(torch.cat(parts))
    inputs = family.inputs(family.paddings[-1])
    logits = tasks.model(**inputs, prefix_names=[["short", "default"], None, ["default"]]).logits
    for i, expected in enumerate((joined, base, tasks.alone["default"])):
        assert_row(logits, inputs, i, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("beams", [1, 3])
@each_family
def test_every_row_generates_the_tokens_of_its_task_alone(
    family: Family, beams: int, cache: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)  # of which all five speak with many tokens
    tasks = Tasks(tmp_path, family, family.model(**TALKATIVE[family.name]))
    inputs = {name: tensor for name, tensor in family.inputs("none").items() if "decoder" not in name}
    settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    caching = {"static": {"cache_implementation": "static", "disable_compile": True}, "none": {"use_cache": False}}
    tokens = tasks.model.generate(**inputs, **settings, **caching.get(cache, {}), prefix_names=NAMES)
    assert len(tokens.unique()) > 3, "a model that repeats one token would hide mistakes"
    for i, name in enumerate(NAMES):
        expected = tasks.of(name).generate(**row(inputs, i), **settings)
        assert torch.equal(tokens[i : i + 1, : expected.shape[1]], expected), name


@each_family
def test_gradients_of_a_mixed_batch_are_the_sum_of_those_of_its_rows(family: Family, tmp_path: Path) -> None:
    tasks, inputs = Tasks(tmp_path, family, family.model()), family.inputs("none")
    get_named_prefix(tasks.model, "short").requires_grad_(True)
    names = ["default", "short", "default"]
    tasks.model(**inputs, prefix_names=names).logits.square().sum().backward()
    for i, name in enumerate(names):
        tasks.alone[name](**row(inputs, i)).logits.square().sum().backward()
    for name in ("default", "short"):
        grads = [
            torch.cat([p.grad.flatten() for p in encoder.parameters()])
            for encoder in (get_named_prefix(tasks.model, name), tasks.alone[name].prefix_encoder)
        ]
        assert grads[1].abs().max() > 1e-2
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [T5, BART, WHISPER], ids=lambda family: family.name)
def test_a_compiled_model_takes_selections_in_one_graph(family: Family, tmp_path: Path) -> None:
    family = with_depths(family, 1, 1)
    tasks, inputs = Tasks(tmp_path, family, family.model()), family.inputs("none")
    tasks.model.prefix_encoder.requires_grad_(False)
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    backbone = tasks.model.base_model
    compiled = torch.compile(backbone, backend=count, fullgraph=True)
    with torch.no_grad():
        compilations = []
        for names in (NAMES, ["default", "short", None], ["short", "unmoved", "default"]):
            selection = select_prefixes(tasks.model, names)
            expected = backbone(**inputs, prefix_names=names)[0]
            torch.testing.assert_close(compiled(**inputs, prefix_names=selection)[0], expected)
            compilations.append(len(graphs))
    assert len(set(compilations)) == 1, "another selection does not compile again"


@pytest.mark.parametrize("family", [T5, BART], ids=lambda family: family.name)
def test_what_one_thread_has_selected_moves_no_positions_in_another(family: Family, tmp_path: Path) -> None:
    tasks, inputs = Tasks(tmp_path, family, family.model()), family.inputs("none")
    plain, elsewhere = tasks.model(**inputs).logits, []

    def run_elsewhere(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: elsewhere.append(tasks.model(**inputs).logits))
            thread.start()
            thread.join()

    # In the middle of the decoder's call, before it looks up its positions.
    hook = tasks.model.get_decoder().embed_tokens.register_forward_hook(run_elsewhere)
    with use_prefixes(tasks.model, NAMES):
        logits = tasks.model(**inputs).logits
    hook.remove()
    for i, name in enumerate(NAMES):
        assert_row(logits, inputs, i, tasks.of(name))
    assert elsewhere and all(torch.equal(one, plain) for one in elsewhere)
    assert torch.equal(tasks.model(**inputs).logits, plain), "nothing is left behind"


@pytest.mark.parametrize("family", [family for family in FAMILIES if "t5" not in family.name], ids=lambda f: f.name)
def test_the_positions_that_are_left_are_those_of_the_longest_row(family: Family, tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, family, family.model())
    inputs = family.inputs("none")
    inputs["decoder_input_ids"] = torch.randint(3, 97, (3, 28))
    tasks.model(**inputs, prefix_names=["short", "short", None])
    with pytest.raises(ValueError, match=r"decoder_input_ids: 28 tokens do not fit.*by 7, which leaves 25 "):
        tasks.model(**inputs, prefix_names=["short", ["short", "default"], None])
    set_prefix(tasks.model, "short")
    assert trainable(tasks.model).keys() <= {f"prefix_encoder.{role}.table" for role in ("encoder", "decoder", "cross")}
    torch.testing.assert_close(tasks.model(**inputs).logits, tasks.alone["short"](**inputs).logits)
