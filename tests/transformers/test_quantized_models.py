"""Prefixes on models whose weights are quantised: by torchao to 8 bits, by bitsandbytes to 8 and 4 bits, on a CPU."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from family_checks import (
    Family,
    check_activation_checkpointing,
    check_against_eager,
    check_against_peft,
    check_generation,
    check_mixed_batch,
    prepared,
    text_batch,
)
from tiny_models import P, tiny_model, trainable, without_dropout
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)

from prefix_kernels.integrations.peft import accelerate
from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    load_prefix_model,
    remove_prefix,
    save_prefix_model,
)

torchao = pytest.importorskip("torchao", reason="torchao quantises the models")
quantization = pytest.importorskip("torchao.quantization")

AUTO_CLASSES = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
# The head is trained, so it is not quantised.
HEADS = ["classifier"]


def plain(family: str) -> PreTrainedModel:
    return without_dropout(tiny_model(family, AUTO_CLASSES[family]))


def quantized_in_place(family: str) -> PreTrainedModel:
    model = plain(family)

    def body(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name not in HEADS

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=body)
    return model


def loaded(family: str, config: object) -> PreTrainedModel:
    """A model that Transformers quantises while it loads it."""
    with tempfile.TemporaryDirectory() as folder:
        plain(family).save_pretrained(folder)
        model = AUTO_CLASSES[family].from_pretrained(folder, quantization_config=config)
    return without_dropout(model.eval())


def loaded_by_torchao(family: str) -> PreTrainedModel:
    int8 = quantization.Int8WeightOnlyConfig()
    return loaded(family, TorchAoConfig(int8, modules_to_not_convert=[*HEADS, "lm_head"]))


def loaded_by_bitsandbytes(family: str, **bits: bool) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    return loaded(family, BitsAndBytesConfig(**bits, llm_int8_skip_modules=[*HEADS, "lm_head"]))


QUANTIZED: dict[str, Callable[[str], PreTrainedModel]] = {
    "torchao": quantized_in_place,
    "torchao, loaded": loaded_by_torchao,
    "bitsandbytes, 4 bits": functools.partial(loaded_by_bitsandbytes, load_in_4bit=True),
}
EIGHT_BITS = functools.partial(loaded_by_bitsandbytes, load_in_8bit=True)


def family_of(name: str, make: Callable[[str], PreTrainedModel]) -> Family:
    def labels(inputs: dict[str, Tensor]) -> Tensor:
        if name == "bert":
            return torch.tensor([0, 1, 2])
        return inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.tensor(1)) == 0, -100)

    def model() -> PreTrainedModel:
        torch.manual_seed(0)
        return make(name)

    return Family(name, model, text_batch, labels, peft_task="SEQ_CLS" if name == "bert" else "CAUSAL_LM")


each_model = pytest.mark.parametrize("name", AUTO_CLASSES)
each_quantizer = pytest.mark.parametrize("make", QUANTIZED.values(), ids=QUANTIZED)


@each_model
@each_quantizer
def test_the_weights_of_the_tests_are_quantised_and_stay_so(name: str, make: Callable) -> None:
    model = make(name)
    kinds = {key: type(parameter) for key, parameter in model.named_parameters()}
    projections = [kind for key, kind in kinds.items() if "layer" in key and key.endswith("v_proj.weight")]
    projections += [kind for key, kind in kinds.items() if key.endswith("value.weight")]
    assert len(projections) == 2 and not {nn.Parameter, Tensor} & set(projections)
    get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=P))
    assert {key: type(model.get_parameter(key)) for key in kinds} == kinds
    heads = {f"{head}.{key}" for head in HEADS for key in ("weight", "bias")} if name == "bert" else set()
    assert set(trainable(model)) == {"prefix_encoder.table"} | heads
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@each_model
@each_quantizer
def test_logits_and_prefix_gradients_are_those_of_concatenation(name: str, make: Callable, padding: str) -> None:
    check_against_eager(family_of(name, make), padding)


@each_model
@each_quantizer
def test_logits_and_prefix_gradients_are_those_of_peft(name: str, make: Callable) -> None:
    check_against_peft(family_of(name, make), "left")


@each_model
@pytest.mark.parametrize("padding", ["none", "left"])
def test_eight_bits_of_bitsandbytes_differ_by_the_rounding_of_its_activations(name: str, padding: str) -> None:
    """It rounds activations to 8 bits too, where a difference in the last bit can become one of a whole step."""
    family = family_of(name, EIGHT_BITS)
    ours = prepared(family, family.model())
    baseline = prepared(family, family.model(), attention="torch")
    baseline.load_state_dict(ours.state_dict())
    inputs = family.inputs(padding)
    results = []
    for model in (ours, baseline):
        output = model(**inputs, labels=family.labels(inputs))
        output.loss.backward()
        logits = (
            output.logits[inputs["attention_mask"].bool()] if name == "llama" and padding == "left" else output.logits
        )
        results.append((logits, model.prefix_encoder.table.grad))
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() < 0.02 * expected.norm()
    # In each layer, keys and values.
    assert results[0][1].abs().amax(dim=(0, 2, 3)).min() > 1e-3


@each_model
@each_quantizer
def test_a_prefix_is_trained_and_the_weights_stay(name: str, make: Callable) -> None:
    family = family_of(name, make)
    base, inputs = family.model(), family.inputs("left")
    labels = family.labels(inputs)
    model = prepared(family, base, modules_to_save=[]).train()
    assert set(trainable(model)) == {"prefix_encoder.table"}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert model.prefix_encoder.table.grad.ne(0).all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses
    assert torch.equal(remove_prefix(model).eval()(**inputs).logits, base(**inputs).logits)


@each_model
@each_quantizer
def test_layers_may_be_checkpointed(name: str, make: Callable) -> None:
    check_activation_checkpointing(family_of(name, make), use_reentrant=False, projection=True)


@each_quantizer
def test_generation_is_that_of_full_recomputation(make: Callable) -> None:
    check_generation(family_of("llama", make), caches=("dynamic",))


@each_model
@each_quantizer
def test_rows_of_a_batch_name_their_tasks(name: str, make: Callable, tmp_path: Path) -> None:
    check_mixed_batch(family_of(name, make), tmp_path)


@each_model
@each_quantizer
def test_a_stored_task_is_loaded_into_a_quantised_model_and_into_the_plain_one(
    name: str, make: Callable, tmp_path: Path
) -> None:
    family = family_of(name, make)
    model, inputs = prepared(family, family.model()), text_batch("left")
    save_prefix_model(model, tmp_path / "task.safetensors")
    again = load_prefix_model(family.model(), tmp_path / "task.safetensors")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    on_plain = load_prefix_model(plain(name), tmp_path / "task.safetensors")
    assert torch.equal(on_plain.prefix_encoder.table, model.prefix_encoder.table)


@each_model
@each_quantizer
def test_removal_gives_the_model_back(name: str, make: Callable) -> None:
    family = family_of(name, make)
    base, inputs = family.model(), text_batch("left")
    model = copy.deepcopy(base)
    get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=P))
    for one in (model, copy.deepcopy(model)):
        assert torch.equal(remove_prefix(one)(**inputs).logits, base(**inputs).logits)
        assert getattr(one, "is_quantized", None) == getattr(base, "is_quantized", None)
        assert set(trainable(one)) == set(trainable(base))


@each_model
@each_quantizer
def test_a_model_of_peft_is_accelerated(name: str, make: Callable) -> None:
    family = family_of(name, make)
    config = peft.PrefixTuningConfig(task_type=family.peft_task, num_virtual_tokens=P)
    model, inputs = peft.get_peft_model(family.model(), config).eval(), text_batch("left")
    table = model.prompt_encoder.default.embedding.weight
    results = []
    for one in (model, accelerate):
        model = one if one is model else accelerate(model)
        table.grad = None
        output = model(**inputs, labels=family.labels(inputs))
        output.loss.backward()
        logits = output.logits if name == "bert" else output.logits[inputs["attention_mask"].bool()]
        results.append((logits, table.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@each_quantizer
def test_a_model_prepared_for_training_by_peft_takes_a_prefix(make: Callable) -> None:
    family = family_of("llama", make)
    # It switches gradient checkpointing on.
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = prepared(family, peft.prepare_model_for_kbit_training(family.model(), **settings)).train()
    inputs = text_batch("none")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert set(trainable(model)) == {"prefix_encoder.table"}
    assert model.prefix_encoder.table.grad.ne(0).all()


LOADED = [*list(QUANTIZED.values())[1:], EIGHT_BITS]


@pytest.mark.parametrize("make", LOADED, ids=["torchao", "bitsandbytes, 4 bits", "bitsandbytes, 8 bits"])
@each_model
def test_trainer_trains_a_quantised_model_and_goes_on_from_its_checkpoint(
    name: str, make: Callable, tmp_path: Path
) -> None:
    family = family_of(name, make)
    inputs = text_batch("right")
    inputs |= {"labels": family.labels(inputs)}
    rows = [{key: tensor[row] for key, tensor in inputs.items()} for row in (0, 1, 2)] * 2

    def trained(folder: Path, checkpoint: Path | None) -> PreTrainedModel:
        model = prepared(family, family.model())
        arguments = transformers.TrainingArguments(
            *(str(folder),),
            **{"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05},
            **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "seed": 0},
        )
        transformers.Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=checkpoint)
        return model

    model = trained(tmp_path / "one go", None)
    before = prepared(family, family.model()).prefix_encoder.table
    assert (model.prefix_encoder.table - before).abs().mean() > 0.02
    resumed = trained(tmp_path / "resumed", tmp_path / "one go" / "checkpoint-2")
    for key, parameter in trainable(model).items():
        torch.testing.assert_close(resumed.get_parameter(key), parameter)


def test_trainer_still_refuses_what_no_gradient_passes_through() -> None:
    model = plain("llama")
    model.is_quantized, model.hf_quantizer = True, type("Quantizer", (), {"is_trainable": False})()
    get_prefix_model(model)
    assert model.is_quantized


def test_a_model_stays_quantised_for_trainer_if_its_preparation_fails() -> None:
    model = loaded_by_torchao("bert")
    with pytest.raises(ValueError, match="modules_to_save: expected names among"):
        get_prefix_model(model, PrefixTuningConfig(modules_to_save=["nothing"]))
    assert model.is_quantized


WHOLE: dict[str, Callable[[], PreTrainedModel]] = {
    "torchao": lambda: loaded("bert", TorchAoConfig(quantization.Int8WeightOnlyConfig())),
    "bitsandbytes, 4 bits": lambda: loaded("bert", BitsAndBytesConfig(load_in_4bit=True)),
    "bitsandbytes, 8 bits": lambda: loaded("bert", BitsAndBytesConfig(load_in_8bit=True)),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_quantised_head_is_refused_with_the_settings_that_keep_it_whole(kind: str) -> None:
    if kind != "torchao":
        pytest.importorskip("bitsandbytes")
    model = WHOLE[kind]()
    before = set(trainable(model))
    with pytest.raises(ValueError, match="expected modules whose weights can be trained, got 'classifier'") as error:
        get_prefix_model(model)
    for setting in ("modules_to_not_convert", "llm_int8_skip_modules", "filter_fn"):
        assert setting in str(error.value)
    assert set(trainable(model)) == before and not hasattr(model, "prefix_encoder")
    # The prefix alone can be trained.
    get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=P, modules_to_save=[]))
    model(**text_batch("left"), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert model.prefix_encoder.table.grad.ne(0).all()


def test_a_stored_task_with_a_head_is_refused_by_a_model_whose_head_is_quantised(tmp_path: Path) -> None:
    save_prefix_model(get_prefix_model(plain("bert")), tmp_path / "task.safetensors")
    model = WHOLE["torchao"]()
    with pytest.raises(ValueError, match="got 'classifier', whose weight is quantised .Int8Tensor, torch.float32.;"):
        load_prefix_model(model, tmp_path / "task.safetensors")
    assert not hasattr(model, "prefix_encoder")
