"""The Transformers integration, on tiny random models of every supported family."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import (
    LABELS,
    LAYERS,
    ONE_OF_EACH,
    P,
    Sentences,
    batch,
    prepared,
    tiny_model,
    trainable,
    with_peft,
    without_dropout,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from prefix_kernels.checkpoint import read_prefix_metadata
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_prefix_model,
    remove_prefix,
    save_prefix_model,
)
from prefix_kernels.integrations.transformers.attention.interface import prefix_attention, prefix_attention_forward
from prefix_kernels.integrations.transformers.attention.torch_baseline import torch_attention_forward
from prefix_kernels.integrations.transformers.runtime.call_prefixes import CallPrefixes
from prefix_kernels.reference import prefix_attention_reference

GENERATORS = ("gpt2", "llama")
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "gpt2", "llama")


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_prefix_gradients_are_those_of_peft(family: str, padding: str) -> None:
    base = tiny_model(family)
    ours = prepared(base)
    theirs = with_peft(base, ours)
    inputs = batch(family, padding)

    our_output, their_output = ours(**inputs, labels=LABELS), theirs(**inputs, labels=LABELS)
    our_output.loss.backward()
    their_output.loss.backward()

    torch.testing.assert_close(our_output.logits, their_output.logits, rtol=0, atol=1e-5)
    our_grad, their_grad = (
        ours.prefix_encoder.table.grad.flatten(1),
        theirs.prompt_encoder.default.embedding.weight.grad,
    )
    assert their_grad.abs().max() > 1e-2
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_the_torch_baseline_is_the_same_model(family: str, padding: str) -> None:
    base = tiny_model(family)
    ours = prepared(base)
    baseline = prepared(base, attention="torch")
    baseline.load_state_dict(ours.state_dict())
    inputs = batch(family, padding)
    for model in (ours, baseline):
        model(**inputs, labels=LABELS).loss.backward()
    torch.testing.assert_close(ours(**inputs).logits, baseline(**inputs).logits, rtol=0, atol=1e-5)
    for name, parameter in trainable(ours).items():
        torch.testing.assert_close(parameter.grad, baseline.get_parameter(name).grad, rtol=0, atol=1e-5)


def test_positions_given_by_the_caller_are_moved_like_those_of_peft() -> None:
    base = tiny_model("llama")
    ours = prepared(base)
    theirs = with_peft(base, ours)
    inputs = batch("llama") | {"position_ids": torch.arange(7).expand(3, 7) + 2}
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_inputs_embeds_give_what_input_ids_give(family: str) -> None:
    model = prepared(tiny_model(family))
    inputs = batch(family)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    by_embeddings = model.base_model(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(by_embeddings, model.base_model(**inputs).last_hidden_state)


@pytest.mark.parametrize("attention", ["prefix_kernels", "torch"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", GENERATORS)
def test_generated_tokens_are_those_of_peft_with_every_cache(family: str, beams: int, attention: str) -> None:
    base = tiny_model(family, AutoModelForCausalLM)
    ours = prepared(base, attention=attention)
    theirs = with_peft(base, ours, "CAUSAL_LM")
    settings = batch(family, "left") | {"max_new_tokens": 10, "num_beams": beams, "do_sample": False}

    expected = theirs.generate(**settings)
    assert len(expected[:, 7:].unique()) > 3, "a model that repeats one token would hide mistakes"
    assert torch.equal(ours.generate(**settings), expected)
    assert torch.equal(ours.generate(**settings, use_cache=False), expected)
    assert torch.equal(ours.generate(**settings, cache_implementation="static", disable_compile=True), expected)


def test_the_prefix_never_enters_the_cache() -> None:
    model = prepared(tiny_model("llama", AutoModelForCausalLM))
    input_ids = batch("llama")["input_ids"]
    first = model(input_ids[:, :4], use_cache=True)
    assert first.past_key_values.get_seq_length() == 4
    second = model(input_ids[:, 4:], past_key_values=first.past_key_values)
    assert second.past_key_values.get_seq_length() == 7
    torch.testing.assert_close(second.logits, model(input_ids).logits[:, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_training_moves_the_prefix_and_nothing_frozen(family: str) -> None:
    model = prepared(without_dropout(tiny_model(family)), modules_to_save=()).train()
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    assert list(trainable(model)) == ["prefix_encoder.table"]
    inputs = batch(family, "right")
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs, labels=LABELS).loss
        loss.backward()
        assert model.prefix_encoder.table.grad.ne(0).all(), "every element of the prefix receives a gradient"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name


@pytest.mark.parametrize("projection", [False, True], ids=["table", "projection"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_activation_checkpointing_gives_the_same_gradients(family: str, use_reentrant: bool, projection: bool) -> None:
    dropout = {"attention_dropout": 0.1} if family == "llama" else {}  # the others have it by default
    plain = prepared(tiny_model(family, **dropout), prefix_projection=projection, prefix_dropout=0.1).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    inputs = batch(family, "right")
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        # Two passes accumulate, and the second forward pass runs before the first backward pass.
        losses = [model(**inputs, labels=LABELS).loss, model(**inputs, labels=LABELS.flip(0)).loss]
        for loss in losses:
            loss.backward()
    for name, parameter in trainable(plain).items():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(checkpointed.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-7)


def test_a_copy_of_a_prepared_model_has_a_prefix_of_its_own() -> None:
    model = prepared(tiny_model("bert"))
    inputs = batch("bert")
    before = model(**inputs).logits
    duplicate = copy.deepcopy(model)
    torch.testing.assert_close(duplicate(**inputs).logits, before)
    with torch.no_grad():
        duplicate.prefix_encoder.table.zero_()
    assert not torch.allclose(duplicate(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)


def test_models_in_one_process_do_not_disturb_each_other() -> None:
    config = tiny_model("bert").config
    plain, first, second = (AutoModelForSequenceClassification.from_config(config).eval() for _ in range(3))
    inputs = batch("bert")
    plain_logits = plain(**inputs).logits
    get_prefix_model(first, PrefixTuningConfig(num_virtual_tokens=3))
    first_logits = first(**inputs).logits
    get_prefix_model(second, PrefixTuningConfig(num_virtual_tokens=6, attention="torch"))
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(plain(**inputs).logits, plain_logits)
    assert torch.equal(first(**inputs).logits, first_logits)

    results: dict[str, list[Tensor]] = {}

    def run(name: str, model: PreTrainedModel) -> None:
        with torch.no_grad():
            results[name] = [model(**inputs).logits for _ in range(5)]

    second_logits = second(**inputs).logits
    models = {"plain": plain, "first": first, "second": second, "first again": first}
    threads = [threading.Thread(target=run, args=item) for item in models.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {"plain": plain_logits, "first": first_logits, "second": second_logits, "first again": first_logits}
    for name, logits in expected.items():
        for repeated in results[name]:
            torch.testing.assert_close(repeated, logits, rtol=0, atol=1e-6)


def test_an_exception_in_a_layer_leaves_nothing_behind() -> None:
    model = prepared(tiny_model("gpt2"))
    inputs = batch("gpt2")
    before = model(**inputs).logits

    def fail(*_: object) -> None:
        raise ArithmeticError("planted")

    hook = model.base_model.h[1].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="planted"):
        model(**inputs)
    hook.remove()
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("projection", [False, True], ids=["table", "projection"])
def test_a_saved_task_gives_the_same_logits_in_a_fresh_model(tmp_path: Path, projection: bool) -> None:
    base = tiny_model("bert")
    model = prepared(base, prefix_projection=projection)
    with torch.no_grad():
        model.classifier.weight.normal_()
    save_prefix_model(model, tmp_path / "task.safetensors")
    assert set(read_prefix_metadata(tmp_path / "task.safetensors")) >= {"prefix_tuning_config"}

    loaded = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")
    inputs = batch("bert", "right")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert not loaded.prefix_encoder.projection
    assert set(trainable(loaded)) == {"prefix_encoder.table", "classifier.weight", "classifier.bias"}


def test_an_unfolded_task_can_be_trained_on(tmp_path: Path) -> None:
    base = tiny_model("bert")
    model = prepared(base, prefix_projection=True)
    save_prefix_model(model, tmp_path / "task.safetensors", fold=False)
    loaded = load_prefix_model(copy.deepcopy(base), tmp_path / "task.safetensors")
    assert loaded.prefix_tuning_config == model.prefix_tuning_config
    for name, parameter in trainable(model).items():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_a_task_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    save_prefix_model(prepared(tiny_model("bert")), tmp_path / "task.safetensors")
    other = tiny_model("bert", num_labels=2)
    with pytest.raises(ValueError, match="classifier.weight: expected shape"):
        load_prefix_model(other, tmp_path / "task.safetensors")
    assert not hasattr(other, "prefix_encoder")
    other(**batch("bert"))


def test_removing_the_prefix_restores_the_model() -> None:
    base = tiny_model("roberta")
    inputs = batch("roberta", "right")
    before = base(**inputs).logits
    state = set(base.state_dict())
    for model in (prepared(base), copy.deepcopy(prepared(base))):
        assert not torch.allclose(model(**inputs).logits, before)
        remove_prefix(model)
        assert torch.equal(model(**inputs).logits, before)
        assert set(model.state_dict()) == state
        assert all(parameter.requires_grad for parameter in model.parameters())
        get_prefix_model(model)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_trainer_trains_evaluates_saves_and_loads_the_best(tmp_path: Path, checkpointing: bool | None) -> None:
    model = prepared(tiny_model("bert"), prefix_projection=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=None if checkpointing is None else {"use_reentrant": checkpointing},
    )
    data = Sentences("bert")
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()

    assert [set(log) >= {"eval_loss"} for log in trainer.state.log_history].count(True) == 2
    for name, parameter in trainable(model).items():
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)

    resumed = prepared(tiny_model("bert"), prefix_projection=True)
    arguments.load_best_model_at_end = False
    transformers.Trainer(resumed, arguments, train_dataset=data, eval_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    inputs = batch("bert")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2").eval()
    torch.testing.assert_close(remove_prefix(resumed.eval())(**inputs).logits, saved(**inputs).logits)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_model_gives_the_same_logits_and_gradients(family: str) -> None:
    model = prepared(tiny_model(family))
    inputs = batch(family, "right" if family == "bert" else "none")
    expected = model(**inputs, labels=LABELS)
    expected.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.zero_grad()

    torch._dynamo.reset()
    output = torch.compile(model.base_model, backend="aot_eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(output.last_hidden_state, model.base_model(**inputs).last_hidden_state)
    compiled = torch.compile(model, backend="aot_eager")(**inputs, labels=LABELS)
    compiled.loss.backward()
    torch.testing.assert_close(compiled.logits, expected.logits)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_bfloat16_model_takes_a_float32_prefix(family: str) -> None:
    base = tiny_model(family)
    exact = prepared(base)
    model = prepared(base.to(torch.bfloat16))
    model.prefix_encoder.load_state_dict(exact.prefix_encoder.state_dict())
    inputs = batch(family, "right")
    output = model(**inputs, labels=LABELS)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert model.prefix_encoder.table.dtype == model.prefix_encoder.table.grad.dtype == torch.float32
    expected = exact(**inputs).logits
    assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast_takes_a_float32_prefix() -> None:
    model = prepared(tiny_model("bert"))
    inputs = batch("bert", "right")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs, labels=LABELS)
    output.loss.backward()
    expected = model(**inputs).logits
    assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.prefix_encoder.table.grad.isfinite().all()


def test_packed_sequences_do_not_see_each_other() -> None:
    """The baseline takes them as a mask; attention="prefix_kernels" has test_transformers_packed.py."""
    model = prepared(tiny_model("llama", AutoModelForCausalLM), attention="torch")
    first, second = torch.randint(3, 97, (1, 4)), torch.randint(3, 97, (1, 3))
    with pytest.warns(UserWarning, match="packed sequences"):
        packed = model(
            torch.cat([first, second], 1), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), use_cache=False
        ).logits
    alone = torch.cat([model(first).logits, model(second).logits], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_a_mask_of_four_dimensions_is_applied_as_given() -> None:
    model = prepared(tiny_model("llama", AutoModelForCausalLM))
    input_ids = batch("llama")["input_ids"]
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7)
    torch.testing.assert_close(model(input_ids, attention_mask=causal).logits, model(input_ids).logits)
    full = torch.ones_like(causal)
    assert not torch.allclose(model(input_ids, attention_mask=full).logits[:, :-1], model(input_ids).logits[:, :-1])


def test_a_decoder_made_bidirectional_sees_everything() -> None:
    model = prepared(tiny_model("llama"), modules_to_save=())
    model.config.is_causal = False
    first, changed = batch("llama")["input_ids"], None
    changed = first.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90 + 3
    hidden = [model.base_model(ids).last_hidden_state[:, 0] for ids in (first, changed)]
    assert not torch.allclose(*hidden), "the first token sees the last"


@pytest.mark.parametrize("attention", [prefix_attention_forward, torch_attention_forward])
def test_a_sliding_window_limits_the_sequence_and_not_the_prefix(attention: Callable) -> None:
    module = nn.Module()
    module.is_causal, module.prefix_site = True, 0
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    prefix_key, prefix_value = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    prefixes = CallPrefixes({0: (prefix_key, prefix_value)})
    out, _ = attention(module, query, key, value, None, sliding_window=2, call_prefixes=prefixes)

    columns, rows = torch.arange(6), torch.arange(6)[:, None]
    window = (columns <= rows) & (columns > rows - 2)
    expected = prefix_attention_reference(query, key, value, prefix_key, prefix_value, attn_mask=window)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=0, atol=1e-5)


def test_no_mask_of_size_sq_times_sk_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        seen.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return prefix_attention(*args, **kwargs)

    monkeypatch.setattr("prefix_kernels.integrations.transformers.attention.interface.prefix_attention", spy)
    for family in ONE_OF_EACH:
        for padding in ("none", "left"):
            seen.clear()
            prepared(tiny_model(family))(**batch(family, padding))
            assert len(seen) == LAYERS
            for mask, is_causal in seen:
                assert (mask is None) if padding == "none" else mask.shape == (3, 1, 1, 7)
                assert is_causal == (family in GENERATORS)


def test_the_prefix_is_generated_once_per_forward_pass() -> None:
    model = prepared(tiny_model("bert"), prefix_projection=True)
    calls = []
    model.prefix_encoder.register_forward_hook(lambda *_: calls.append(1))
    model(**batch("bert"))
    assert len(calls) == 1


def test_none_leaves_positions_alone_and_keeps_all_of_them() -> None:
    base = tiny_model("bert", max_position_embeddings=12)
    longest = torch.randint(3, 97, (2, 12))
    prepared(base, position_offset="none")(longest)
    shifted = prepared(base)
    shifted(longest[:, : 12 - P])
    with pytest.raises(ValueError, match=r"12 tokens do not fit.*leaves 7.*position_offset='none'"):
        shifted(longest)
