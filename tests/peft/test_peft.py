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
from family_checks import Family
from peft.tuners.cartridge.utils import compose_cartridge_adapters
from test_transformers import LABELS, ONE_OF_EACH, P, Sentences, batch, prepared, tiny_model, without_dropout
from test_transformers_decoders import FAMILIES as DECODERS
from test_transformers_encoder_decoders import BART, FLAN_T5, MBART, T5, TALKATIVE, tiny_bart
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from prefix_kernels.functional import prefix_attention
from prefix_kernels.integrations.peft import accelerate, restore

KINDS = ("prefix", "projection", "cartridge")
FROZEN = 2


def config_of(kind: str, task_type: str = "SEQ_CLS", length: int = P, **settings: object) -> peft.PeftConfig:
    if kind == "cartridge":
        return peft.CartridgeConfig(
            task_type=task_type, num_virtual_tokens=length, **({"num_frozen_tokens": FROZEN} | settings)
        )
    settings = {"prefix_projection": kind == "projection"} | settings
    return peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=length, **settings)


def peft_model(family: str, kind: str = "prefix", **settings: object) -> peft.PeftModel:
    """PEFT's model for the classification of sequences, in eval mode."""
    return peft.get_peft_model(tiny_model(family, **settings), config_of(kind)).eval()


def language_model(family: str, kind: str = "prefix", **settings: object) -> peft.PeftModel:
    base = tiny_model(family, AutoModelForCausalLM, **settings)
    return peft.get_peft_model(base, config_of(kind, "CAUSAL_LM")).eval()


# Whatever PEFT runs, by its task.
FAMILIES = [*DECODERS, T5, FLAN_T5, BART, MBART]


def of_family(families: list[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


def peft_of_family(family: Family, base: PreTrainedModel) -> peft.PeftModel:
    """PEFT's model, in eval mode."""
    config = config_of("prefix", family.peft_task, **family.peft_settings)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    atol = 1e-5 * max(1.0, expected.detach().abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_outputs(ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Equal logits, losses and gradients of everything that is trained."""
    our_output, their_output = ours(**inputs), theirs(**inputs)
    padding = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    for name in ("loss", "logits", "start_logits", "end_logits", "last_hidden_state"):
        if name in their_output:
            ragged = padding is not None and their_output[name].shape[:2] == padding.shape
            valid = padding.bool() if ragged else ...
            assert_close(our_output[name][valid], their_output[name][valid])
    for output in (our_output, their_output):
        (output.loss if "loss" in output else output[0].tanh().sum()).backward()
    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    assert max(grad.abs().max() for name, grad in expected.items() if name.startswith("prompt_encoder.")) > 1e-2
    for name, grad in gradients(ours).items():
        assert_close(grad, expected[name])


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


TASKS = {
    "TOKEN_CLS": (AutoModelForTokenClassification, {"labels": torch.arange(21).view(3, 7) % 3}),
    "QUESTION_ANS": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 3, 6])},
    ),
    "FEATURE_EXTRACTION": (AutoModel, {}),
}


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


def test_the_active_adapter_is_used_whatever_its_length() -> None:
    theirs = language_model("llama")
    theirs.add_adapter("longer", config_of("projection", "CAUSAL_LM", P + 3))
    ours = accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("added", config_of("prefix", "CAUSAL_LM", 2))
    inputs = batch("llama", "left")
    logits = {}
    for name in ("longer", "added", "default"):
        for model in (theirs, ours):
            model.set_adapter(name)
        logits[name] = ours(**inputs).logits
        assert_close(logits[name], theirs(**inputs).logits)
    assert not torch.allclose(logits["longer"], logits["added"]) and not torch.allclose(
        logits["added"], logits["default"]
    )
    ours.delete_adapter("longer")
    torch.testing.assert_close(ours(**inputs).logits, logits["default"])


def test_an_adapter_loaded_later_is_used(tmp_path: Path) -> None:
    other = peft_model("bert", "projection")
    other.save_pretrained(tmp_path)
    theirs = peft_model("bert")
    ours = accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        model.load_adapter(tmp_path, "other")
        model.set_adapter("other")
    inputs = batch("bert", "right")
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)


def test_a_disabled_adapter_is_not_there() -> None:
    base = tiny_model("llama", AutoModelForCausalLM)
    ours = accelerate(peft.get_peft_model(copy.deepcopy(base), config_of("prefix", "CAUSAL_LM")).eval())
    inputs = batch("llama", "left")
    settings = {"max_new_tokens": 6, "do_sample": False}
    with_prefix, tokens = ours(**inputs).logits, ours.generate(**inputs, **settings)
    valid = inputs["attention_mask"].bool()
    with ours.disable_adapter():
        assert_close(ours(**inputs).logits[valid], base(**inputs).logits[valid])
        assert torch.equal(ours.generate(**inputs, **settings), base.generate(**inputs, **settings))
        with ours.disable_adapter():
            pass
        assert_close(ours(**inputs).logits[valid], base(**inputs).logits[valid])
    assert torch.equal(ours(**inputs).logits, with_prefix)
    assert torch.equal(ours.generate(**inputs, **settings), tokens)
    assert not torch.equal(base.generate(**inputs, **settings), tokens)


def test_an_exception_while_disabled_enables_again() -> None:
    ours = accelerate(peft_model("bert"))
    inputs = batch("bert")
    before = ours(**inputs).logits
    with pytest.raises(ArithmeticError), ours.disable_adapter():
        raise ArithmeticError
    assert torch.equal(ours(**inputs).logits, before)


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


def test_a_model_whose_adapter_was_disabled_before_can_be_accelerated() -> None:
    theirs = language_model("llama")
    inputs = batch("llama")
    expected = theirs(**inputs).logits
    inside = r"with its adapter enabled, got one inside disable_adapter\(\)"
    with theirs.disable_adapter(), pytest.raises(ValueError, match=inside):
        accelerate(theirs)
    ours = accelerate(theirs)
    assert ours(**inputs, use_cache=True).past_key_values.get_seq_length() == 7
    assert_close(ours(**inputs).logits, expected)


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


def test_a_replaced_attention_implementation_cannot_silently_drop_the_prefix() -> None:
    model = accelerate(peft_model("bert"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="implementation is 'sdpa', which would ignore the prefix"):
        model(**batch("bert"))


def test_names_for_each_row_are_refused() -> None:
    model = accelerate(language_model("llama"))
    inputs = batch("llama")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"adapter_names: expected None, got \['default'\]"):
            call(**inputs, adapter_names=["default"])
        with pytest.raises(ValueError, match=r"prefix_names: expected None, got \['default'\]"):
            call(**inputs, prefix_names=["default"])


def changed(model: peft.PeftModel, **settings: object) -> peft.PeftModel:
    for name, value in settings.items():
        setattr(model.peft_config["default"], name, value)
    return model


def without_task() -> peft.PeftModel:
    return peft.PeftModel(tiny_model("bert"), peft.PrefixTuningConfig(num_virtual_tokens=P))


def of_another_class() -> peft.PeftModel:
    model = peft_model("bert")
    model.__class__ = type("Mine", (peft.PeftModelForSequenceClassification,), {})
    return model


def of_mixed_types() -> peft.PeftModel:
    model = peft_model("bert")
    model.peft_config["other"] = peft.PromptTuningConfig(num_virtual_tokens=P)
    return model


def sharing_its_base() -> peft.PeftModel:
    first = language_model("llama")
    second = peft.get_peft_model(first.get_base_model(), config_of("prefix", "CAUSAL_LM"))
    accelerate(first)
    return second


def deberta() -> peft.PeftModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model("deberta-v2", vocab_size=99, **sizes)
    base = transformers.AutoModelForSequenceClassification.from_config(config)
    return peft.get_peft_model(base, config_of("prefix"))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: tiny_model("bert"), TypeError, "expected a peft.PeftModel, got BertForSequenceClassification"),
        (
            lambda: accelerate(peft_model("bert")),
            ValueError,
            r"is accelerated already; restore\(peft_model\) undoes it",
        ),
        (
            lambda: peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(task_type="SEQ_CLS")),
            ValueError,
            "types PREFIX_TUNING, CARTRIDGE, got 'default' of type LORA",
        ),
        (
            lambda: peft.get_peft_model(tiny_model("bert"), peft.PromptTuningConfig("SEQ_CLS", num_virtual_tokens=P)),
            ValueError,
            "types PREFIX_TUNING, CARTRIDGE, got 'default' of type PROMPT_TUNING",
        ),
        (of_mixed_types, ValueError, "types PREFIX_TUNING, CARTRIDGE, got 'other' of type PROMPT_TUNING"),
        (
            without_task,
            ValueError,
            "expected a model with a task_type, got one without; PEFT runs it without its prefix",
        ),
        (of_another_class, TypeError, "expected one of PeftModelForSequenceClassification, .*got Mine"),
        (
            lambda: peft.get_peft_model(
                tiny_bart("bart", transformers.AutoModelForSequenceClassification), config_of("prefix")
            ),
            ValueError,
            "expected num_transformer_submodules=2, .*like BartForSequenceClassification, got 1",
        ),
        (
            lambda: peft.get_peft_model(tiny_bart(encoder_layers=1), config_of("prefix", "SEQ_2_SEQ_LM")),
            ValueError,
            "num_layers: expected at most 1, the layers of PEFT's prefix, got 2",
        ),
        (deberta, ValueError, r"DebertaV2ForSequenceClassification .*does not go through.*AttentionInterface"),
        (sharing_its_base, ValueError, "LlamaForCausalLM below the PEFT model has a prefix already"),
        (
            lambda: peft.get_peft_model(prepared(tiny_model("bert")), config_of("prefix")),
            ValueError,
            "BertForSequenceClassification below the PEFT model has a prefix already",
        ),
        (lambda: changed(peft_model("llama"), num_layers=1), ValueError, "expected num_layers=2.*got 1"),
        (
            lambda: changed(peft_model("llama"), num_attention_heads=4, token_dim=32),
            ValueError,
            "adapter 'default': expected num_attention_heads=2 and token_dim=16.*got 4 and 32",
        ),
    ],
)
def test_what_cannot_be_accelerated_is_refused(build: Callable, error: type[Exception], message: str) -> None:
    model = build()
    with pytest.raises(error, match=message):
        accelerate(model)


def test_only_an_accelerated_model_can_be_restored() -> None:
    with pytest.raises(ValueError, match=r"expected a model of accelerate\(\), got PeftModelForSequenceClassification"):
        restore(peft_model("bert"))


def test_an_adapter_that_does_not_fit_is_refused_when_it_runs() -> None:
    model = accelerate(peft_model("bert"))
    model.add_adapter("shallow", config_of("prefix", num_layers=1))
    model.set_adapter("shallow")
    with pytest.raises(ValueError, match="adapter 'shallow': expected num_layers=2, the layers of the model, got 1"):
        model(**batch("bert"))


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
