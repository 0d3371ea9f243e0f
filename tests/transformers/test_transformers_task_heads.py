"""Tasks by name that tell different numbers of labels apart."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from encoder_decoder_families import END, text, tiny_bart
from tiny_models import P, batch, prepared, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from prefix_kernels.checkpoint import read_prefix_metadata
from prefix_kernels.integrations.transformers import (
    load_named_prefix,
    load_prefix_model,
    prefix_names,
    save_prefix_model,
    select_prefixes,
    set_prefix,
)
from prefix_kernels.integrations.transformers.storage.labels import Labels
from prefix_kernels.integrations.transformers.tasks.heads import labels_of_size

# What is trained for it: real numbers, classes, or several labels at once.
LABELS = {
    "default": torch.tensor([0, 1, 1]),
    "five": torch.tensor([4, 0, 3]),
    "score": torch.tensor([0.5, -1.0, 2.0]),
    "several": torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 3),
}
NUM_LABELS = {"default": 2, "five": 5, "score": 1, "several": 4}
PROBLEMS = {
    "default": "single_label_classification",
    "five": "single_label_classification",
    "score": "regression",
    "several": "multi_label_classification",
}


def trained(base: PreTrainedModel, head: str, num_labels: int) -> PreTrainedModel:
    """``base`` with a new head for so many labels, and a prefix."""
    config = copy.deepcopy(base.config)
    config.num_labels = num_labels
    model = type(base)(config).eval()
    body = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith(head)}
    model.load_state_dict(body, strict=False)
    return prepared(model)


class Tasks:
    """A model with each task alone, and one model with all of them."""

    def __init__(self, folder: Path, base: PreTrainedModel, head: str) -> None:
        self.folder = folder
        self.alone = {name: trained(base, head, count) for name, count in NUM_LABELS.items()}
        for name, model in self.alone.items():
            save_prefix_model(model, folder / name)
        self.model = load_prefix_model(copy.deepcopy(base), folder / "default")
        for name in list(NUM_LABELS)[1:]:
            load_named_prefix(self.model, name, folder / name)


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path, tiny_model("bert", num_labels=2), "classifier")


def classification_of_bart() -> PreTrainedModel:
    return tiny_bart(auto_class=AutoModelForSequenceClassification, num_labels=2)


def ended_text() -> dict[str, Tensor]:
    inputs = text("none")
    inputs["input_ids"][:, -1] = END
    return {"input_ids": inputs["input_ids"]}


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str, Callable[[], dict[str, Tensor]]]] = {
    "bert": (lambda: tiny_model("bert", num_labels=2), "classifier", lambda: batch("bert")),
    "roberta": (lambda: tiny_model("roberta", num_labels=2), "classifier", lambda: batch("roberta")),
    "llama": (lambda: tiny_model("llama", num_labels=2), "score", lambda: batch("llama")),
    "bart": (classification_of_bart, "classification_head", ended_text),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_task_that_is_switched_to_has_its_own_labels_and_loss(family: str, tmp_path: Path) -> None:
    build, head, make_inputs = MODELS[family]
    tasks, inputs = Tasks(tmp_path, build(), head), make_inputs()
    order = ["default", "five", "score", "several", "five", "default", "score"]
    for name in order:
        set_prefix(tasks.model, name)
        output, expected = (one(**inputs, labels=LABELS[name]) for one in (tasks.model, tasks.alone[name]))
        assert output.logits.shape == (3, NUM_LABELS[name])
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)
        config = tasks.model.config
        assert (config.num_labels, config.problem_type) == (NUM_LABELS[name], PROBLEMS[name])


def test_every_token_can_have_labels_of_the_active_task(tmp_path: Path) -> None:
    base = tiny_model("bert", AutoModelForTokenClassification, num_labels=2)
    tasks, inputs = Tasks(tmp_path, base, "classifier"), batch("bert", "right")
    for name in ("five", "default"):
        set_prefix(tasks.model, name)
        labels = torch.randint(NUM_LABELS[name], (3, 7))
        torch.testing.assert_close(
            tasks.model(**inputs, labels=labels).loss, tasks.alone[name](**inputs, labels=labels).loss
        )


def test_the_names_of_labels_are_stored_with_the_task(tasks: Tasks) -> None:
    named = tasks.alone["five"]
    colours = ["red", "green", "blue", "grey", "none"]
    named.config.id2label = dict(enumerate(colours))
    named.config.label2id = {colour: i for i, colour in enumerate(colours)}
    save_prefix_model(named, tasks.folder / "colours")
    load_named_prefix(tasks.model, "colours", tasks.folder / "colours")
    before = copy.deepcopy(tasks.model.config)
    set_prefix(tasks.model, "colours")
    assert tasks.model.config.id2label == named.config.id2label
    assert tasks.model.config.label2id == named.config.label2id
    set_prefix(tasks.model, "default")
    assert tasks.model.config.to_dict() == before.to_dict()


def test_a_fresh_model_has_the_labels_of_the_task_it_loads(tasks: Tasks) -> None:
    stored = tasks.alone["several"]
    stored.config.id2label = dict(enumerate(["sweet", "sour", "salty", "bitter"]))
    stored.config.label2id = {taste: i for i, taste in stored.config.id2label.items()}
    inputs = batch("bert") | {"labels": LABELS["several"]}
    stored(**inputs)  # decides the problem_type
    save_prefix_model(stored, tasks.folder / "tastes")
    model = load_prefix_model(tiny_model("bert", num_labels=4), tasks.folder / "tastes")
    expected = {name: getattr(stored.config, name) for name in ("id2label", "label2id", "problem_type")}
    assert expected["problem_type"] == "multi_label_classification"
    assert {name: getattr(model.config, name) for name in expected} == expected
    load_named_prefix(model, "five", tasks.folder / "five")
    set_prefix(model, "five")
    assert model.config.num_labels == 5
    set_prefix(model, "default")
    assert {name: getattr(model.config, name) for name in expected} == expected


def test_the_words_of_a_language_model_are_not_labels(tmp_path: Path) -> None:
    base = tiny_model("llama", AutoModelForCausalLM)
    save_prefix_model(prepared(base, modules_to_save=["lm_head"]), tmp_path / "task")
    assert "labels" not in read_prefix_metadata(tmp_path / "task")
    model = load_prefix_model(base, tmp_path / "task")
    load_named_prefix(model, "other", tmp_path / "task")
    own = {0: "yes", 1: "no", 2: "maybe"}
    model.config.id2label = dict(own)
    for name in ("other", "default"):
        set_prefix(model, name)
        assert model.config.id2label == own


def test_a_task_of_other_labels_is_trained_and_saved(tasks: Tasks) -> None:
    load_named_prefix(tasks.model, "trained", tasks.folder / "five", is_trainable=True)
    set_prefix(tasks.model, "trained")
    inputs = batch("bert", "right")
    parameters = [p for p in tasks.model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in parameters] == [(5, 32), (5,), (P, 4, 4, 8)]
    tasks.model(**inputs, labels=LABELS["five"]).loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    save_prefix_model(tasks.model, tasks.folder / "again")
    set_prefix(tasks.model, "default")
    load_named_prefix(tasks.model, "again", tasks.folder / "again")
    set_prefix(tasks.model, "again")
    again = tasks.model(**inputs).logits
    set_prefix(tasks.model, "trained")
    assert torch.equal(tasks.model(**inputs).logits, again)
    assert not torch.allclose(again, tasks.alone["five"](**inputs).logits, atol=1e-3)


def test_an_adapter_of_peft_may_have_another_number_of_labels(tmp_path: Path) -> None:
    base = tiny_model("bert", num_labels=2)
    save_prefix_model(prepared(base), tmp_path / "default")
    of_five = copy.deepcopy(base)
    of_five.classifier, of_five.num_labels, of_five.config.num_labels = nn.Linear(32, 5), 5, 5
    theirs = peft.get_peft_model(of_five, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_prefix_model(base, tmp_path / "default")
    load_named_prefix(model, "theirs", tmp_path / "theirs")
    set_prefix(model, "theirs")
    inputs = batch("bert", "left") | {"labels": LABELS["five"]}
    output, expected = model(**inputs), theirs(**inputs)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss)
    assert model.config.num_labels == 5


def test_rows_whose_heads_differ_in_size_are_not_mixed(tasks: Tasks) -> None:
    model, inputs = tasks.model, batch("bert")
    message = (
        r"'five' has another 'classifier' than the active task 'default' \(weight \[5, 32\] instead of \[2, 32\]\)"
    )
    with pytest.raises(ValueError, match=message):
        model(**inputs, prefix_names=["default", "five", None])
    with pytest.raises(ValueError, match=message):
        select_prefixes(model, ["five"] * 3)

    set_prefix(model, "five")
    logits = model(**inputs, prefix_names=["five", None, "five"]).logits
    torch.testing.assert_close(logits[[0, 2]], tasks.alone["five"](**inputs).logits[[0, 2]], rtol=1e-5, atol=1e-5)
    hidden = model.base_model(**inputs, prefix_names=["five", "default", None]).last_hidden_state
    expected = tasks.alone["default"].base_model(**inputs).last_hidden_state
    torch.testing.assert_close(hidden[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_switches_labels_of_its_own(tasks: Tasks, duplicate: Callable) -> None:
    set_prefix(tasks.model, "score")
    other = duplicate(tasks.model)
    set_prefix(other, "five")
    assert (tasks.model.config.num_labels, other.config.num_labels) == (1, 5)
    inputs = batch("bert")
    torch.testing.assert_close(other(**inputs).logits, tasks.alone["five"](**inputs).logits)
    torch.testing.assert_close(tasks.model(**inputs).logits, tasks.alone["score"](**inputs).logits)


@pytest.mark.parametrize(("modules", "heads"), [(["classifier", "bert"], r"\['bert', 'classifier'\]"), ((), r"\[\]")])
def test_a_task_that_trained_other_modules_is_refused(tasks: Tasks, modules: list[str], heads: str) -> None:
    inputs = batch("bert")
    before = tasks.model(**inputs).logits
    other = prepared(tiny_model("bert", num_labels=2), modules_to_save=modules)
    save_prefix_model(other, tasks.folder / "bad")
    with pytest.raises(ValueError, match=rf"bad: expected the heads \['classifier'\], as in the model .*, got {heads}"):
        load_named_prefix(tasks.model, "bad", tasks.folder / "bad")
    assert prefix_names(tasks.model) == list(NUM_LABELS)
    assert torch.equal(tasks.model(**inputs).logits, before)


def test_a_head_that_reads_another_width_is_refused(tasks: Tasks) -> None:
    wide = tasks.alone["five"]
    wide.classifier = nn.Linear(48, 5)
    wide.classifier.trained_with_prefix = True
    save_prefix_model(wide, tasks.folder / "wide")
    inputs = batch("bert")
    before = tasks.model(**inputs).logits
    with pytest.raises(ValueError, match=r"classifier.weight: expected shape \[2, 32\], got \[5, 48\]"):
        load_named_prefix(tasks.model, "wide", tasks.folder / "wide")
    assert torch.equal(tasks.model(**inputs).logits, before) and tasks.model.config.num_labels == 2


def test_heads_that_say_different_numbers_of_labels_are_refused() -> None:
    """PEFT does not store labels, so the sizes of its heads have to say how many there are."""
    heads, fitted = ({"a": nn.Linear(32, a), "b": nn.Linear(32, b)} for a, b in ((2, 2), (5, 4)))
    with pytest.raises(ValueError, match=r"heads: expected one number of labels, got layers with \[4, 5\] outputs"):
        labels_of_size(heads, fitted, Labels.unnamed(2))
