"""Many tasks on one frozen model: prefixes by name, and batches whose rows see different ones."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import peft
import pytest
import torch
from named_tasks import NAMES, TASKS, Tasks, row, row_by_row
from tiny_models import batch, prepared, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from prefix_kernels.checkpoint import mark_only_prefix_as_trainable, prefix_state_dict
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    active_prefix,
    delete_named_prefix,
    get_named_prefix,
    load_named_prefix,
    load_prefix_model,
    prefix_names,
    remove_prefix,
    save_prefix_model,
    select_prefixes,
    set_prefix,
    use_prefixes,
)

GENERATORS = ("gpt2", "llama")
ENCODERS = ("bert", "roberta")


@pytest.fixture
def generator(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path, tiny_model("llama", AutoModelForCausalLM))


@pytest.fixture
def classifier(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path, tiny_model("bert"))


def tiny(family: str) -> PreTrainedModel:
    return tiny_model(family, AutoModelForCausalLM if family in GENERATORS else AutoModelForSequenceClassification)


def valid(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor | slice:
    mask = inputs.get("attention_mask")
    return slice(None) if mask is None or logits.dim() == 2 else mask.bool()


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("attention", ["prefix_kernels", "torch"])
@pytest.mark.parametrize("family", [*ENCODERS, *GENERATORS])
def test_every_row_of_a_mixed_batch_gives_what_its_task_gives_alone(
    family: str, attention: str, padding: str, tmp_path: Path
) -> None:
    tasks = Tasks(tmp_path, tiny(family), attention=attention)
    inputs = batch(family, padding)
    with torch.no_grad():
        logits, expected = tasks.model(**inputs, prefix_names=NAMES).logits, row_by_row(tasks, NAMES, inputs)
    seen = valid(logits, inputs)
    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[seen], tasks.model(**inputs).logits[seen], atol=1e-2), "the tasks differ"


def joined(first: PreTrainedModel, second: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """One task whose prefix is that of ``first`` followed by that of ``second``."""
    tables = [model.prefix_encoder.table for model in (first, second)]
    model = prepared(base, num_virtual_tokens=sum(table.shape[0] for table in tables))
    with torch.no_grad():
        model.prefix_encoder.table.copy_(torch.cat(tables))
    return model


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_prefixes_combined_in_a_row_are_seen_one_after_another(family: str, tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, tiny(family))
    load_named_prefix(tasks.model, "again", tasks.path("default"))
    inputs = batch(family, "left")
    names = [["short", "again"], ["default"], None]
    logits = tasks.model(**inputs, prefix_names=names).logits
    both = joined(tasks.alone["short"], tasks.alone["default"], tasks.base)
    rows = [both, tasks.alone["default"], tasks.base]
    expected = torch.cat([model(**row(inputs, i)).logits for i, model in enumerate(rows)])
    seen = valid(logits, inputs)
    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "search",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "returned beams", "sampled"],
)
@pytest.mark.parametrize("cache", [None, "static", "no cache"])
@pytest.mark.parametrize("family", GENERATORS)
def test_every_row_generates_the_tokens_of_its_task_alone(
    family: str, cache: str | None, search: dict[str, object], tmp_path: Path
) -> None:
    tasks = Tasks(tmp_path, tiny(family))
    inputs = batch(family, "left")
    # Of the most likely token alone: a random one would depend on the other rows.
    settings = {"max_new_tokens": 6, "do_sample": False} | search | ({"top_k": 1} if "do_sample" in search else {})
    caching = {None: {}, "static": {"cache_implementation": "static", "disable_compile": True}}
    tokens = tasks.model.generate(**inputs, **settings, **caching.get(cache, {"use_cache": False}), prefix_names=NAMES)
    per_row = search.get("num_return_sequences", 1)
    for i, name in enumerate(NAMES):
        expected = tasks.of(name).generate(**row(inputs, i), **settings)
        own = tokens[i * per_row : (i + 1) * per_row, : expected.shape[1]]
        assert torch.equal(own, expected), name


def test_combined_prefixes_generate_the_tokens_of_the_joined_one(generator: Tasks) -> None:
    inputs = batch("llama", "left")
    settings = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    tokens = generator.model.generate(**inputs, **settings, prefix_names=[["short", "default"], None, ["default"]])
    expected = joined(generator.alone["short"], generator.alone["default"], generator.base).generate(
        **row(inputs, 0), **settings
    )
    assert torch.equal(tokens[:1, : expected.shape[1]], expected)


def test_a_prefix_set_by_name_is_the_one_that_is_used_trained_and_saved(classifier: Tasks, tmp_path: Path) -> None:
    model, inputs = classifier.model, batch("bert", "right")
    assert prefix_names(model) == ["default", "short", "unmoved"] and active_prefix(model) == "default"
    for name in ("short", "unmoved", "default", "short"):
        set_prefix(model, name)
        assert active_prefix(model) == name
        torch.testing.assert_close(model(**inputs).logits, classifier.alone[name](**inputs).logits)
    assert model.prefix_tuning_config.num_virtual_tokens == 2
    save_prefix_model(model, tmp_path / "saved.safetensors")
    again = load_prefix_model(copy.deepcopy(classifier.base), tmp_path / "saved.safetensors")
    torch.testing.assert_close(again(**inputs).logits, classifier.alone["short"](**inputs).logits)


def test_heads_are_switched_with_the_prefix_and_never_mixed(classifier: Tasks) -> None:
    other = classifier.alone["short"]
    nn.init.normal_(other.classifier.weight)
    save_prefix_model(other, classifier.path("other"))
    model, inputs = classifier.model, batch("bert")
    load_named_prefix(model, "other", classifier.path("other"))
    before = model(**inputs).logits
    with pytest.raises(ValueError, match="'other' has another 'classifier' than the active task 'default'"):
        model(**inputs, prefix_names=["default", "other", None])
    with pytest.raises(ValueError, match="'other' has another 'classifier'"):
        select_prefixes(model, ["other"])

    set_prefix(model, "other")
    torch.testing.assert_close(model(**inputs).logits, other(**inputs).logits)
    torch.testing.assert_close(model(**inputs, prefix_names=["other"] * 3).logits, other(**inputs).logits)
    set_prefix(model, "default")
    assert torch.equal(model(**inputs).logits, before)


def test_the_backbone_alone_mixes_tasks_of_different_heads(classifier: Tasks) -> None:
    other = classifier.alone["short"]
    nn.init.normal_(other.classifier.weight)
    save_prefix_model(other, classifier.path("other"))
    load_named_prefix(classifier.model, "other", classifier.path("other"))
    inputs = batch("bert")
    hidden = classifier.model.base_model(**inputs, prefix_names=["other", None, None]).last_hidden_state
    torch.testing.assert_close(hidden[:1], other.base_model(**row(inputs, 0)).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients_of_a_mixed_batch_are_the_sum_of_those_of_its_rows(
    generator: Tasks, checkpointing: bool | None
) -> None:
    load_named_prefix(generator.model, "trained", generator.path("short"), is_trainable=True)
    model, inputs = generator.model.train(), batch("llama")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    names = ["trained", "default", "trained"]
    model(**inputs, prefix_names=names).logits.square().sum().backward()

    alone = {"trained": generator.alone["short"], "default": generator.alone["default"]}
    for i, name in enumerate(names):
        alone[name](**row(inputs, i)).logits.square().sum().backward()
    for name, single in alone.items():
        expected = single.prefix_encoder.table.grad
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(get_named_prefix(model, name).table.grad, expected, rtol=1e-4, atol=1e-4)
    assert get_named_prefix(model, "unmoved").table.grad is None


def test_a_prefix_being_trained_is_seen_as_it_is_now(generator: Tasks) -> None:
    model, inputs = generator.model, batch("llama")
    with torch.no_grad():
        model(**inputs, prefix_names=["default", "short", None])
        # Not through anything that counts versions.
        model.prefix_encoder.table.data.mul_(2.0)
        generator.alone["default"].prefix_encoder.table.mul_(2.0)
        names = ["default", "short", None]
        logits, expected = model(**inputs, prefix_names=names).logits, row_by_row(generator, names, inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_prefix_dropout_is_applied_in_a_mixed_batch(generator: Tasks) -> None:
    model, inputs = generator.model, batch("llama")
    names = ["default"] * 3
    model.prefix_encoder.dropout = 0.5
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(**inputs, prefix_names=names).logits, model(**inputs, prefix_names=names).logits)
        model.eval()
        assert torch.equal(model(**inputs, prefix_names=names).logits, model(**inputs, prefix_names=names).logits)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_model_takes_names_and_selections_in_one_graph(family: str, tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, tiny(family))
    backbone, inputs = tasks.model.base_model, batch(family)
    tasks.model.prefix_encoder.requires_grad_(False)
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(backbone, backend=count, fullgraph=True)
    with torch.no_grad():
        compilations = []
        for names in (NAMES, ["default", "short", None], ["short", "unmoved", "default"]):
            selection = select_prefixes(tasks.model, names)
            expected = backbone(**inputs, prefix_names=names).last_hidden_state
            result = compiled(**inputs, prefix_names=selection).last_hidden_state
            torch.testing.assert_close(result, expected)
            compilations.append(len(graphs))
        assert len(set(compilations)) == 1, "another selection does not compile again"
        result = compiled(**inputs, prefix_names=NAMES).last_hidden_state
        torch.testing.assert_close(result, backbone(**inputs, prefix_names=NAMES).last_hidden_state)


def test_a_compiled_mixed_batch_trains(generator: Tasks) -> None:
    model, inputs = generator.model, batch("llama")
    names = ["default", "short", "default"]
    table = model.prefix_encoder.table
    (expected,) = torch.autograd.grad(model(**inputs, prefix_names=names).logits.square().mean(), table)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(**inputs, prefix_names=names).logits.square().mean(), table)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_an_open_selection_is_not_lost_in_compiled_code(generator: Tasks) -> None:
    model, inputs = generator.model, batch("llama")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(**inputs).logits
        with use_prefixes(model, NAMES):
            mixed = compiled(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, plain)
        torch.testing.assert_close(mixed, model(**inputs, prefix_names=NAMES).logits)


def test_an_open_selection_serves_callers_that_take_no_argument(generator: Tasks) -> None:
    model, inputs = generator.model, batch("llama")
    plain, mixed = model(**inputs).logits, model(**inputs, prefix_names=NAMES).logits
    with use_prefixes(model, NAMES):
        assert torch.equal(model(**inputs).logits, mixed)
        with use_prefixes(model, ["short"] * 3):
            assert not torch.allclose(model(**inputs).logits, mixed)
        twice = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in inputs.items()}
        torch.testing.assert_close(model(**twice).logits, mixed.repeat_interleave(2, dim=0), rtol=1e-5, atol=1e-5)
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(model(**inputs).logits))
        thread.start()
        thread.join()
        assert torch.equal(elsewhere[0], plain), "another thread has selected nothing"
    assert torch.equal(model(**inputs).logits, plain)


def test_an_exception_closes_the_selection(generator: Tasks) -> None:
    model, inputs = generator.model, batch("llama")
    plain = model(**inputs).logits
    with pytest.raises(ArithmeticError), use_prefixes(model, NAMES):
        raise ArithmeticError

    def fail(*_: object) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        model.generate(**inputs, max_new_tokens=2, prefix_names=NAMES, logits_processor=[fail])
    assert torch.equal(model(**inputs).logits, plain)


def test_copies_and_pickles_have_tasks_of_their_own(generator: Tasks) -> None:
    inputs = batch("llama", "left")
    settings = {"max_new_tokens": 4, "do_sample": False, "prefix_names": NAMES}
    expected = generator.model.generate(**inputs, **settings)
    for duplicate in (copy.deepcopy(generator.model), pickle.loads(pickle.dumps(generator.model))):
        assert torch.equal(duplicate.generate(**inputs, **settings), expected)
        with torch.no_grad():
            for name in prefix_names(duplicate):
                get_named_prefix(duplicate, name).table.zero_()
        assert not torch.equal(duplicate.generate(**inputs, **settings), expected)
        set_prefix(duplicate, "short")
    assert torch.equal(generator.model.generate(**inputs, **settings), expected)
    assert active_prefix(generator.model) == "default"
    selection = select_prefixes(duplicate, NAMES)
    for call in (generator.model, generator.model.generate):
        with pytest.raises(ValueError, match="expected a selection made for this model, got one made for another"):
            call(**inputs, prefix_names=selection)


def test_tasks_are_no_part_of_the_models_parameters_and_state(classifier: Tasks) -> None:
    model, alone = classifier.model, classifier.alone["default"]
    model(**batch("bert"), prefix_names=NAMES)
    assert list(model.state_dict()) == list(alone.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in alone.named_modules()]
    assert list(prefix_state_dict(model)) == list(prefix_state_dict(alone))
    names = mark_only_prefix_as_trainable(model)
    assert names == ["prefix_encoder.table"]
    assert not any(parameter.requires_grad for parameter in get_named_prefix(model, "short").parameters())


def test_removing_the_prefix_removes_the_tasks(generator: Tasks) -> None:
    inputs = batch("llama")
    model = remove_prefix(generator.model)
    assert torch.equal(model(**inputs).logits, generator.base(**inputs).logits)
    assert not vars(model).keys() - vars(generator.base).keys()
    assert not model._forward_pre_hooks and not model._forward_hooks and not model.base_model._forward_pre_hooks
    with pytest.raises(ValueError, match=r"not used by the model: \['prefix_names'\]"):
        model.generate(**inputs, prefix_names=NAMES, max_new_tokens=2)
    with pytest.raises(ValueError, match="prepared by get_prefix_model, got a plain LlamaForCausalLM"):
        set_prefix(model, "short")


def test_a_deleted_task_is_forgotten(generator: Tasks) -> None:
    model, inputs = generator.model, batch("llama")
    expected = model(**inputs, prefix_names=["unmoved", None, "default"]).logits
    delete_named_prefix(model, "short")
    assert prefix_names(model) == ["default", "unmoved"]
    torch.testing.assert_close(model(**inputs, prefix_names=["unmoved", None, "default"]).logits, expected)
    with pytest.raises(ValueError, match="expected a task that is not active, got 'default'"):
        delete_named_prefix(model, "default")


def test_tasks_of_any_length_per_layer_are_mixed(tmp_path: Path) -> None:
    base = tiny_model("llama", AutoModelForCausalLM)
    own = {"one": {"num_virtual_tokens": [2, 6]}, "other": {"num_virtual_tokens": [4, 1]}}
    alone = {name: prepared(base, position_offset="none", **settings) for name, settings in own.items()}
    for name, model in alone.items():
        save_prefix_model(model, tmp_path / name)
    model = load_prefix_model(copy.deepcopy(base), tmp_path / "one")
    load_named_prefix(model, "other", tmp_path / "other")
    inputs = batch("llama")
    logits = model(**inputs, prefix_names=["other", "default", None]).logits
    rows = [alone["other"], alone["one"], base]
    expected = torch.cat([one(**row(inputs, i)).logits for i, one in enumerate(rows)])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["short", "absent", None], ValueError, r"expected names among \['default', .*\], got 'absent'"),
        (["short", "short"], ValueError, "expected one entry for each of the 3 rows of the batch, got 2"),
        (["short"] * 6, ValueError, "expected one entry for each of the 3 rows of the batch, got 6"),
        ("short", TypeError, "expected a list with a name, a list of names, or None for each row, got 'short'"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    generator: Tasks, names: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"prefix_names: {message}"):
        generator.model(**batch("llama"), prefix_names=names)


def test_a_task_that_does_not_fit_is_refused_and_leaves_no_trace(generator: Tasks) -> None:
    model, inputs = generator.model, batch("llama")
    before = model(**inputs).logits
    save_prefix_model(prepared(generator.base, layers=[0]), generator.path("bad"))
    with pytest.raises(ValueError, match="bad: expected a prefix at the same attentions as the model's first"):
        load_named_prefix(model, "bad", generator.path("bad"))
    with pytest.raises(ValueError, match=r"prefix_encoder.table: expected shape \[3, 4, 2, 8\], got \[2, 4, 2, 8\]"):
        load_named_prefix(model, "bad", generator.path("short"), config=PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"name: expected a string other than \[.*\], got 'short'"):
        load_named_prefix(model, "short", generator.path("short"))
    assert prefix_names(model) == list(TASKS) and torch.equal(model(**inputs).logits, before)


def test_tasks_for_which_a_window_slides_otherwise_are_refused(tmp_path: Path) -> None:
    base = tiny_model("mistral", AutoModelForCausalLM, num_key_value_heads=2, sliding_window=4)
    save_prefix_model(prepared(base, window_includes_prefix=True), tmp_path / "task")
    with pytest.raises(ValueError, match="other: expected window_includes_prefix=False as in the model"):
        load_named_prefix(prepared(base), "other", tmp_path / "task")


@pytest.mark.parametrize("window_includes_prefix", [False, True])
def test_rows_of_a_model_with_sliding_windows_are_mixed(window_includes_prefix: bool, tmp_path: Path) -> None:
    base = tiny_model("mistral", AutoModelForCausalLM, num_key_value_heads=2, sliding_window=4)
    tasks = Tasks(tmp_path, base, window_includes_prefix=window_includes_prefix)
    inputs = batch("mistral")
    logits = tasks.model(**inputs, prefix_names=NAMES).logits
    torch.testing.assert_close(logits, row_by_row(tasks, NAMES, inputs), rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 5, "do_sample": False}
    tokens = tasks.model.generate(**inputs, **settings, prefix_names=NAMES)
    for i, name in enumerate(NAMES):
        expected = tasks.of(name).generate(**row(inputs, i), **settings)
        assert torch.equal(tokens[i : i + 1, : expected.shape[1]], expected), name


def test_an_adapter_of_peft_is_one_of_the_tasks(generator: Tasks, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(copy.deepcopy(generator.base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    load_named_prefix(generator.model, "theirs", tmp_path / "adapter")
    inputs = batch("llama", "left")
    logits = generator.model(**inputs, prefix_names=["short", "theirs", None]).logits[1:2]
    valid = inputs["attention_mask"][1:2].bool()
    torch.testing.assert_close(logits[valid], theirs(**row(inputs, 1)).logits[valid], rtol=1e-5, atol=1e-5)


def test_a_task_whose_positions_the_model_cannot_move_is_refused(generator: Tasks) -> None:
    model = load_prefix_model(copy.deepcopy(generator.base), generator.path("unmoved"))
    with pytest.raises(ValueError, match="short: expected position_offset='none' in a model that was prepared with it"):
        load_named_prefix(model, "short", generator.path("short"))
