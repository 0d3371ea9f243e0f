"""PEFT's prefix tuning on our kernels: what accelerate() changes, and what it must not change."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from encoder_decoder_families import TALKATIVE
from family_checks import Family
from peft.tuners.cartridge.utils import compose_cartridge_adapters
from peft_models import (
    FAMILIES,
    KINDS,
    TASKS,
    assert_close,
    assert_same_outputs,
    config_of,
    gradients,
    language_model,
    of_family,
    peft_model,
    peft_of_family,
)
from tiny_models import LABELS, ONE_OF_EACH, P, Sentences, batch, tiny_model, without_dropout
from torch import Tensor
from transformers import AutoModelForCausalLM

from prefix_kernels.functional import prefix_attention
from prefix_kernels.integrations.peft import accelerate, restore


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_logits_and_gradients_are_those_of_peft(family: str, kind: str, padding: str) -> None:
    theirs = peft_model(family, kind)
    ours = accelerate(copy.deepcopy(theirs))
    assert_same_outputs(ours, theirs, batch(family, padding) | {"labels": LABELS})


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@of_family(FAMILIES)
def test_every_family_gives_the_logits_and_gradients_of_peft(family: Family, padding: str) -> None:
    theirs = peft_of_family(family, family.model())
    inputs = family.inputs(padding)
    assert_same_outputs(accelerate(copy.deepcopy(theirs)), theirs, inputs | {"labels": family.labels(inputs)})


@pytest.mark.parametrize("token_types", [False, True], ids=["", "token types"])
@pytest.mark.parametrize("task_type", TASKS)
@pytest.mark.filterwarnings("ignore:token_type_ids")
def test_every_task_of_peft_gives_the_same(task_type: str, token_types: bool) -> None:
    auto_class, labels = TASKS[task_type]
    base = tiny_model("bert", auto_class, num_labels=2 if task_type == "QUESTION_ANS" else 3)
    theirs = peft.get_peft_model(base, config_of("prefix", task_type)).eval()
    inputs = batch("bert", "right") | labels
    if token_types:
        inputs["token_type_ids"] = torch.arange(21).view(3, 7) % 2
    assert_same_outputs(accelerate(copy.deepcopy(theirs)), theirs, inputs)


def test_what_peft_drops_silently_is_dropped_with_a_warning() -> None:
    ours = accelerate(language_model("gpt2"))
    inputs = batch("gpt2")
    with pytest.warns(UserWarning, match="token_type_ids: PEFT's prefix tuning ignores them"):
        logits = ours(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"])).logits
    assert torch.equal(logits, ours(**inputs).logits)


def test_positional_arguments_are_in_the_order_of_peft() -> None:
    theirs = peft_model("bert")
    ours = accelerate(copy.deepcopy(theirs))
    inputs = batch("bert", "right")
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    their_loss = theirs(inputs["input_ids"], inputs["attention_mask"], None, LABELS).loss
    torch.testing.assert_close(ours(inputs["input_ids"], inputs["attention_mask"], None, LABELS).loss, their_loss)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_positions_and_embeddings_given_by_the_caller_mean_what_they_mean_to_peft(family: str) -> None:
    theirs = language_model(family)
    ours = accelerate(copy.deepcopy(theirs))
    ids = batch(family)["input_ids"]
    embeddings = theirs.get_input_embeddings()(ids)
    for inputs in ({"input_ids": ids, "position_ids": torch.arange(7).expand(3, 7) + 2}, {"inputs_embeds": embeddings}):
        assert_close(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generated_tokens_are_those_of_peft(family: str, kind: str, beams: int) -> None:
    theirs = language_model(family, kind)
    ours = accelerate(copy.deepcopy(theirs))
    settings = batch(family, "left") | {"max_new_tokens": 10, "num_beams": beams, "do_sample": False}
    expected = theirs.generate(**settings)
    assert len(expected[:, 7:].unique()) > 3, "a model that repeats one token would hide mistakes"
    assert torch.equal(ours.generate(**settings), expected)
    assert torch.equal(ours.generate(**settings, cache_implementation="static", disable_compile=True), expected)


@of_family(FAMILIES)
def test_every_family_generates_the_tokens_of_peft(family: Family) -> None:
    theirs = peft_of_family(family, family.model(**TALKATIVE.get(family.name, {})))
    ours = accelerate(copy.deepcopy(theirs))
    inputs = {name: tensor for name, tensor in family.inputs("left").items() if "decoder" not in name}
    for beams in (1, 3):
        settings = inputs | {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
        expected = theirs.generate(**settings)
        assert len(expected.unique()) > 2, "a model that repeats one token would hide mistakes"
        assert torch.equal(ours.generate(**settings), expected)


def test_the_prefix_never_enters_the_cache() -> None:
    model = accelerate(language_model("llama"))
    input_ids = batch("llama")["input_ids"]
    first = model(input_ids[:, :4], use_cache=True)
    assert first.past_key_values.get_seq_length() == 4
    second = model(input_ids[:, 4:], past_key_values=first.past_key_values)
    assert_close(second.logits, model(input_ids).logits[:, 4:])


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_is_evaluated_once_and_not_repeated_for_the_rows(
    kind: str, inference: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = peft_model("bert", kind)
    if inference:
        model.save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    accelerate(model)
    prefixes, evaluations = [], []

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        prefixes.append(args[3])
        return prefix_attention(*args, **kwargs)

    monkeypatch.setattr("prefix_kernels.integrations.transformers.attention.interface.prefix_attention", spy)
    model.prompt_encoder.default.register_forward_hook(lambda module, args, out: evaluations.append(args[0].shape))
    model(**batch("bert", "right"))
    assert [prefix.shape for prefix in prefixes] == [(4, P, 8)] * 2
    assert len({prefix.untyped_storage().data_ptr() for prefix in prefixes}) == 1
    assert evaluations == ([] if inference else [(1, P)])


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_where_peft_was(kind: str) -> None:
    """The optimizer made for the PEFT model trains the accelerated one, to the same parameters."""
    theirs = without_dropout(peft_model("bert", kind)).train()
    ours = copy.deepcopy(theirs)
    before = dict(ours.named_parameters())
    inputs = batch("bert", "right") | {"labels": LABELS}
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(4):
            if model is ours and step == 2:
                accelerate(ours)
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    assert all(parameter is before[name] for name, parameter in ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_close(before[name], parameter)


def test_the_first_tokens_of_a_cartridge_stay_frozen() -> None:
    model = accelerate(peft_model("llama", "cartridge"))
    encoder = model.prompt_encoder.default
    frozen, trained = encoder.frozen_embedding.detach().clone(), encoder.trainable_embedding.detach().clone()
    model(**batch("llama"), labels=LABELS).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert torch.equal(encoder.frozen_embedding, frozen)
    assert encoder.trainable_embedding.ne(trained).all()


def stored(model: peft.PeftModel, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_saves_the_same_files(kind: str, tmp_path: Path) -> None:
    model = peft_model("bert", kind)
    expected = stored(model, tmp_path / "theirs")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= expected.keys()
    assert stored(accelerate(model), tmp_path / "ours") == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_loaded_checkpoint_gives_the_logits_of_peft(family: str, kind: str, tmp_path: Path) -> None:
    trained = peft_model(family, kind)
    trained.save_pretrained(tmp_path)
    loaded = accelerate(peft.PeftModel.from_pretrained(trained.get_base_model(), tmp_path))
    inputs = batch(family, "left")
    assert_close(loaded(**inputs).logits, trained(**inputs).logits)


def test_composed_cartridges_give_the_tokens_of_peft(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    base = tiny_model("llama", AutoModelForCausalLM)
    for folder, length in zip(folders, (3, 4), strict=True):
        config = config_of("cartridge", "CAUSAL_LM", length)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    compose_cartridge_adapters(folders, output_path=tmp_path / "both")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "both")
    ours = accelerate(copy.deepcopy(theirs))
    assert ours.prompt_encoder.default.weight.shape[0] == 7
    settings = batch("llama", "left") | {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**settings), theirs.generate(**settings))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_activation_checkpointing_gives_the_same_gradients(family: str, kind: str, use_reentrant: bool) -> None:
    plain = accelerate(peft_model(family, kind)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model(**batch(family, "right"), labels=LABELS).loss.backward()
    expected = gradients(plain)
    for name, grad in gradients(checkpointed).items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, expected.pop(name), rtol=1e-4, atol=1e-6)
    assert not expected


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_trainer_trains_saves_and_resumes(tmp_path: Path, checkpointing: bool | None) -> None:
    base = tiny_model("bert")
    model = accelerate(peft.get_peft_model(copy.deepcopy(base), config_of("prefix")))

    def train(**settings: object) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            learning_rate=0.05,
            use_cpu=True,
            report_to=[],
            gradient_checkpointing=checkpointing is not None,
            gradient_checkpointing_kwargs=None if checkpointing is None else {"use_reentrant": checkpointing},
            **settings,
        )
        return transformers.Trainer(model, arguments, train_dataset=Sentences("bert"), eval_dataset=Sentences("bert"))

    before = model.prompt_encoder.default.embedding.weight.detach().clone()
    train(max_steps=2).train()
    trained = model.prompt_encoder.default.embedding.weight.detach().clone()
    assert trained.ne(before).all()
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.zero_()
    train(max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (model.prompt_encoder.default.embedding.weight - trained).abs().max() < 0.2, (
        "it goes on from the second step"
    )

    inputs = batch("bert")
    expected = model.eval()(**inputs).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-4")
    assert_close(loaded(**inputs).logits, expected)


def test_the_base_model_by_itself_has_no_prefix() -> None:
    base = tiny_model("bert")
    ours = accelerate(peft.get_peft_model(copy.deepcopy(base), config_of("prefix")).eval())
    inputs = batch("bert", "right")
    expected = base(**inputs).logits
    assert_close(ours.get_base_model()(**inputs).logits, expected)

    results = []
    entered, left = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            left.wait(60)

    hook = ours.get_base_model().bert.embeddings.register_forward_hook(wait)
    thread = threading.Thread(target=lambda: results.append(ours(**inputs).logits))
    thread.start()
    entered.wait(60)
    # The other thread is in the middle of the accelerated model.
    assert_close(ours.get_base_model()(**inputs).logits, expected)
    left.set()
    thread.join()
    hook.remove()
    torch.testing.assert_close(results[0], ours(**inputs).logits)


def test_restore_gives_the_peft_model_back() -> None:
    theirs = peft_model("roberta")
    inputs = batch("roberta", "left")
    expected = theirs(**inputs).logits
    ours = accelerate(theirs)
    assert ours is theirs and type(ours) is not peft.PeftModelForSequenceClassification
    with ours.disable_adapter():
        ours(**inputs)
    for model in (ours, copy.deepcopy(ours)):
        assert restore(model) is model and type(model) is peft.PeftModelForSequenceClassification
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).logits, expected)
        assert_close(accelerate(model)(**inputs).logits, expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_accelerated_too_and_has_a_prefix_of_its_own(duplicate: Callable) -> None:
    model = accelerate(peft_model("bert"))
    inputs = batch("bert")
    before = model(**inputs).logits
    other = duplicate(model)
    assert torch.equal(other(**inputs).logits, before)
    with torch.no_grad():
        other.prompt_encoder.default.embedding.weight.zero_()
    assert not torch.allclose(other(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_bfloat16_model_keeps_its_float32_prefix(family: str) -> None:
    base = tiny_model(family).to(torch.bfloat16)
    theirs = peft.get_peft_model(base, config_of("prefix")).eval()
    ours = accelerate(copy.deepcopy(theirs))
    inputs = batch(family, "right")
    output = ours(**inputs, labels=LABELS)
    output.loss.backward()
    weight = ours.prompt_encoder.default.embedding.weight
    assert output.logits.dtype == torch.bfloat16 and weight.dtype == weight.grad.dtype == torch.float32
    expected = theirs(**inputs).logits
    assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_model_is_one_graph_and_gives_the_same(family: str, kind: str) -> None:
    model = accelerate(peft_model(family, kind) if family == "bert" else language_model(family, kind))
    inputs = batch(family, "right")
    inputs["labels"] = LABELS if family == "bert" else inputs["input_ids"]
    expected = model(**inputs)
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    assert gradients(model)


def test_nothing_else_needs_peft() -> None:
    program = """
import sys
sys.modules["peft"] = None
import prefix_kernels.integrations.transformers
import prefix_kernels.integrations.transformers.storage.peft_checkpoint
try:
    import prefix_kernels.integrations.peft
except ImportError as error:
    assert "prefix_kernels.integrations.peft needs PEFT 0.21 or newer" in str(error), error
else:
    raise SystemExit("it was imported")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
