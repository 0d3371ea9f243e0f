"""Wants that people have of prefix tuning, each tried on small random models: ``ROWS``.

A probe takes a library and the name of a model, and raises unless the outcome is right: the prefix receives a gradient;
logits, gradients and tokens are those of the plain way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from benchmarks.compatibility.libraries import Library, P
from benchmarks.compatibility.tiny_models import (
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    END,
    IMAGE_TOKEN,
    IMAGES,
    IMAGES_BESIDE_TEXT,
    PAD,
    POSITIONS,
    VOCABULARY,
    make_inputs,
)
from benchmarks.compatibility.tiny_models import make_base as make_model

Probe = Callable[[Library, str], None]
NEW_TOKENS = 6
# Keys and values of one attention of four heads: elements of its prefix.
ELEMENTS = 2 * P * 32
# The ends of the names of DoRA's magnitudes in PEFT and in adapters.
DORA_MAGNITUDES = (".lora_magnitude_vector.default.weight", ".task.m.weight")


def check(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def check_close(actual: Tensor, expected: Tensor, what: str) -> None:
    check(torch.allclose(actual, expected, atol=1e-4), f"{what} differ by {(actual - expected).abs().max():.2g}")


def make_base(library: Library, name: str, **settings: object) -> transformers.PreTrainedModel:
    return make_model(name, **(library.base_settings | settings))


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output["logits"] if "logits" in output else output["logits_per_image"]


def gradients(library: Library, model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The gradients of all parameters of the prefix that are trained."""
    model.zero_grad()
    logits_of(model, inputs).float().square().mean().backward()
    trained = [p for p in library.prefixes(model) if p.requires_grad]
    check(bool(trained) and all(p.grad is not None for p in trained), "the prefix receives no gradient")
    return [p.grad.clone() for p in trained]


def trains(library: Library, name: str, model: nn.Module | None = None) -> None:
    model = library.attach(make_base(library, name)) if model is None else model
    reached = [bool(gradient.any()) for gradient in gradients(library, model, make_inputs(name))]
    check(all(reached), "the prefix receives a gradient of zeros")


def check_slope(model: nn.Module, trained: list[Tensor], inputs: dict[str, Tensor]) -> None:
    """Check the gradient of ``trained`` by the difference of the losses a small step up and down along it."""

    def loss() -> Tensor:
        return logits_of(model, inputs).double().square().mean()

    model.zero_grad()
    first = loss()
    first.backward()
    check(all(p.grad is not None and p.grad.any() for p in trained), "what is trained receives no gradient, or zeros")
    check_close(loss(), first, "losses of two equal passes")
    size = sum(p.grad.double().square().sum() for p in trained).sqrt()
    steps = [(p.grad / size).to(p.dtype) for p in trained]
    values = []
    with torch.no_grad():
        for way in (1e-2, -2e-2):
            for parameter, step in zip(trained, steps, strict=True):
                parameter.add_(step, alpha=way)
            values.append(loss())
        slope = (values[0] - values[1]) / 2e-2
        for parameter, step in zip(trained, steps, strict=True):
            parameter.add_(step, alpha=1e-2)
    check(bool((slope - size).abs() < 0.03 * size), f"the gradient has the size {size:.3g}, the slope is {slope:.3g}")


def slopes(library: Library, name: str, model: nn.Module, beside: tuple[str, ...] = ()) -> None:
    """Check the gradients of the prefix, and then those of the trained parameters whose names end in ``beside``."""
    inputs = make_inputs(name)
    prefixes = [p for p in library.prefixes(model) if p.requires_grad]
    check(bool(prefixes), "nothing of the prefix is trained")
    check_slope(model.eval(), prefixes, inputs)
    if beside:
        others = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith(beside)]
        check(bool(others), f"no parameter that ends in {' or '.join(beside)} is trained")
        check_slope(model, others, inputs)


def trained_elements(library: Library, model: nn.Module, name: str) -> int:
    return sum(int(gradient.ne(0).sum()) for gradient in gradients(library, model, make_inputs(name)))


def masked_lm(library: Library, name: str) -> None:
    trains(library, name, library.attach(make_base(library, name, auto_class=transformers.AutoModelForMaskedLM)))


# Batches and calls


@torch.no_grad()
def right_padding(library: Library, name: str) -> None:
    """With the attention that a model has by default."""
    model = library.attach(make_model(name)).eval()
    ids = make_inputs(name, rows=1, length=6)["input_ids"]
    nothing = torch.full((1, 4), PAD)
    inputs = {"input_ids": torch.cat([ids, nothing], 1)}
    inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
    padded, alone = model(**inputs).logits, model(input_ids=ids).logits
    check_close(padded if padded.dim() == 2 else padded[:, :6], alone, "logits of a row, padded and alone,")


def every_position(library: Library, name: str) -> None:
    model = library.at_every_position(make_base(library, name))
    gradients(library, model, make_inputs(name, length=POSITIONS))


@torch.no_grad()
def compiles(library: Library, name: str) -> None:
    model = library.attach(make_base(library, name)).eval()
    inputs = make_inputs(name)
    expected = model(**inputs).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_close(compiled(**inputs).logits, expected, "logits, compiled or not,")


def recomputed(model: nn.Module, ids: Tensor, beams: int) -> Tensor:
    """The best of ``beams`` continuations of one row ``ids [1, S]``, without a cache and without an end."""
    is_encoder_decoder = model.config.is_encoder_decoder
    tokens = torch.full((1, 1), model.config.decoder_start_token_id) if is_encoder_decoder else ids
    scores = torch.zeros(1, 1)
    for _ in range(NEW_TOKENS):
        given = {"input_ids": ids.expand(len(tokens), -1), "decoder_input_ids": tokens}
        inputs = given if is_encoder_decoder else {"input_ids": tokens}
        logits = model(**inputs, use_cache=False).logits[:, -1].float().log_softmax(-1)
        logits[:, END] = -torch.inf
        best, order = (scores + logits).flatten().topk(beams)
        tokens = torch.cat([tokens[order // VOCABULARY], (order % VOCABULARY)[:, None]], 1)
        scores = best[:, None]
    return tokens[:1, -NEW_TOKENS:]


def trains_and_generates(library: Library, name: str) -> None:
    """The gradients are those of the loss, and two rows generate together, with a cache, what each does alone."""
    slopes(library, name, library.attach(make_base(library, name)))
    generates(padding=3)(library, name)


def reads_images(library: Library, name: str) -> None:
    """The gradients are those of the loss; a row sees its image, and generates the same with a cache as without."""
    model = library.attach(make_base(library, name)).eval()
    slopes(library, name, model)
    inputs = make_inputs(name, rows=1)
    ids, images = inputs.pop("input_ids"), inputs

    def logits(tokens: Tensor, **others: Tensor) -> Tensor:
        others = images | others
        if "mm_token_type_ids" in others:
            others["mm_token_type_ids"] = (tokens == IMAGE_TOKEN).long()
        return model(input_ids=tokens, use_cache=False, **others).logits

    with torch.no_grad():
        blank = logits(ids, pixel_values=torch.zeros_like(images["pixel_values"]))
        check(not torch.allclose(logits(ids), blank, atol=1e-2), "the image is not seen")
        tokens = ids
        for _ in range(NEW_TOKENS):
            best = logits(tokens)[:, -1].index_fill(-1, torch.tensor([END, IMAGE_TOKEN]), -torch.inf).argmax(-1)
            tokens = torch.cat([tokens, best[:, None]], 1)
        actual = generated(model, ids, torch.ones_like(ids), suppress_tokens=[IMAGE_TOKEN], **images)
    check(torch.equal(actual, tokens[:, -NEW_TOKENS:]), "other tokens than without a cache")


def generated(model: nn.Module, ids: Tensor, mask: Tensor, **settings: object) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS} | settings
    return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, -NEW_TOKENS:]


def generates(padding: int = 0, num_beams: int = 1, **settings: object) -> Probe:
    """Two rows, the second with ``padding`` on its left, get the tokens that each gets alone without a cache."""

    @torch.no_grad()
    def probe(library: Library, name: str) -> None:
        model = library.attach(make_base(library, name)).eval()
        ids = make_inputs(name)["input_ids"]
        ids[1, :padding] = PAD
        tokens = generated(model, ids, (ids != PAD).long(), num_beams=num_beams, **settings)
        rows = [recomputed(model, row, num_beams) for row in (ids[:1], ids[1:, padding:])]
        check(torch.equal(tokens, torch.cat(rows)), "other tokens than without a cache")

    return probe


# Training


def checkpointing(use_reentrant: bool) -> Probe:
    def probe(library: Library, name: str) -> None:
        model = library.attach(make_base(library, name)).train()
        inputs = make_inputs(name)
        expected = gradients(library, model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for actual, right in zip(gradients(library, model, inputs), expected, strict=True):
            check_close(actual, right, "gradients, checkpointed or not,")

    return probe


def checkpointing_first(library: Library, name: str) -> None:
    base = make_base(library, name)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model = library.attach(base).train()
    inputs = make_inputs(name)
    actual = gradients(library, model, inputs)
    base.gradient_checkpointing_disable()
    for checkpointed, right in zip(actual, gradients(library, model, inputs), strict=True):
        check_close(checkpointed, right, "gradients, checkpointed or not,")


def half_precision(library: Library, name: str) -> None:
    model = library.attach(make_base(library, name).bfloat16())
    trains(library, name, model)
    dtypes = {prefix.dtype for prefix in library.prefixes(model)}
    check(dtypes == {torch.float32}, f"the prefix is {', '.join(map(str, dtypes))}")


def resumes(with_mlp: bool) -> Probe:
    """Four steps are the same in one go, and begun anew from the checkpoint after two."""

    def trained(library: Library, name: str, folder: str, checkpoint: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        base = make_base(library, name)
        model = library.with_mlp(base) if with_mlp else library.attach(base)
        rows = [{"input_ids": ids, "labels": ids} for ids in make_inputs(name, rows=8)["input_ids"]]
        options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
        settings = transformers.TrainingArguments(
            folder, max_steps=4, save_steps=2, learning_rate=0.1, per_device_train_batch_size=2, **options
        )
        if library.name == "adapters":
            from adapters import AdapterTrainer as Trainer
        else:
            from transformers import Trainer
        Trainer(model, settings, train_dataset=rows).train(resume_from_checkpoint=checkpoint)
        return [prefix.detach() for prefix in library.prefixes(model)]

    def probe(library: Library, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            expected = trained(library, name, folder, None)
            actual = trained(library, name, folder, str(Path(folder, "checkpoint-2")))
        for resumed, in_one_go in zip(actual, expected, strict=True):
            check_close(resumed, in_one_go, "prefixes, resumed or trained in one go,")

    return probe


def with_lora(library: Library, name: str) -> None:
    model = library.with_lora(make_base(library, name))
    trains(library, name, model)
    lora = [p for n, p in model.named_parameters() if "lora_B" in n]
    check(bool(lora) and all(p.grad is not None and p.grad.any() for p in lora), "LoRA receives no gradient")


def with_dora(library: Library, name: str) -> None:
    model = library.with_lora(make_base(library, name), use_dora=True)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # begins as zeros
                parameter.normal_(std=0.3)
    slopes(library, name, model, beside=DORA_MAGNITUDES)


def on_quantized_weights(library: Library, name: str) -> None:
    """Logits and gradients are those on weights of the same values that are not quantised."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantized() -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        base = make_base(library, name)
        heads = ("classifier", "lm_head")
        quantize_(base, Int8WeightOnlyConfig(), lambda part, at: isinstance(part, nn.Linear) and at not in heads)
        return base

    whole = quantized()
    for part in whole.modules():
        if isinstance(part, nn.Linear) and hasattr(part.weight, "dequantize") and type(part.weight) is not nn.Parameter:
            part.weight = nn.Parameter(part.weight.dequantize())
    inputs, results = make_inputs(name), []
    for base in (quantized(), whole):
        torch.manual_seed(1)
        model = library.attach(base).eval()
        results.append([logits_of(model, inputs), *gradients(library, model, inputs)])
        kinds = {type(p) for n, p in model.named_parameters() if n.endswith(("v_proj.weight", "value.weight"))}
        check((kinds == {nn.Parameter}) == (base is whole), f"the weights are {kinds}")
    check(all(bool(gradient.any()) for gradient in results[0][1:]), "the prefix receives a gradient of zeros")
    for actual, expected in zip(*results, strict=True):
        check_close(actual, expected, "logits or gradients, on quantised weights or not,")


# The prefix


def all_attentions(library: Library, name: str) -> None:
    """Encoder, decoder and cross-attention, of two layers each."""
    trained = trained_elements(library, library.attach(make_base(library, name)), name)
    check(trained == 6 * ELEMENTS, f"{trained} elements are trained, where 6 attentions have {6 * ELEMENTS}")


def in_one_layer(library: Library, name: str) -> None:
    model = library.in_one_layer(make_base(library, name, num_key_value_heads=4))
    trained = trained_elements(library, model, name)
    check(trained == ELEMENTS, f"{trained} elements are trained, where one layer has {ELEMENTS}")


def of_uneven_lengths(library: Library, name: str) -> None:
    trains(library, name, library.of_uneven_lengths(make_base(library, name)))


@torch.no_grad()
def with_dropout(library: Library, name: str) -> None:
    model = library.with_dropout(make_base(library, name))
    inputs = make_inputs(name)
    differ = {mode: not torch.equal(*(model.train(mode)(**inputs).logits for _ in range(2))) for mode in (True, False)}
    check(differ == {True: True, False: False}, f"two passes differ in training: {differ[True]}, else {differ[False]}")


def first_token_frozen(library: Library, name: str) -> None:
    model = library.with_first_token_frozen(make_base(library, name, num_key_value_heads=4))
    trained, others = trained_elements(library, model, name), 2 * ELEMENTS * (P - 1) // P
    check(trained == others, f"{trained} elements are trained, where two layers have {others} beside the first token")


def from_text(library: Library, name: str) -> None:
    """The logits are those after that text, and the prefix can then be trained."""
    base = make_base(library, name)
    text, ids = make_inputs(name, rows=1, length=P)["input_ids"], make_inputs(name, rows=1)["input_ids"]
    with torch.no_grad():
        expected = base(torch.cat([text, ids], 1)).logits[:, P:]
    model = library.from_text(base, text)
    check_close(model(input_ids=ids).logits, expected, "logits, after the prefix or after its text,")
    trains(library, name, model)


# Many tasks


@torch.no_grad()
def switches(library: Library, name: str) -> None:
    model = library.two_tasks(make_base(library, name))
    ids = make_inputs(name)["input_ids"]
    logits = []
    for task in (0, 1, 0):
        library.switch(model, task)
        logits.append(model(ids).logits)
    check_close(logits[2], logits[0], "logits of a task, before and after another,")
    check(not torch.allclose(logits[0], logits[1], atol=1e-2), "both tasks give the same")


def mixed_batch(rows: list[tuple[int, ...]], of: Callable[..., Tensor]) -> Probe:
    """Rows of one batch do what each does alone, without a cache; the first does something else for other tasks."""

    @torch.no_grad()
    def probe(library: Library, name: str) -> None:
        model = library.two_tasks(make_base(library, name))
        inputs = make_inputs(name, rows=len(rows))

        def alone(row: int, tasks: tuple[int, ...]) -> Tensor:
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            return of(model, one, use_cache=False, **library.for_each_row(model, [tasks]))

        together = of(model, inputs, **library.for_each_row(model, rows))
        expected = torch.cat([alone(row, tasks) for row, tasks in enumerate(rows)])
        check_close(together.float(), expected.float(), "rows, together and alone,")
        check(not torch.allclose(alone(0, rows[0]), alone(0, rows[1])), "all tasks give the same")

    return probe


def logits_for(model: nn.Module, inputs: dict[str, Tensor], **arguments: object) -> Tensor:
    return model(**inputs, **arguments).logits


def tokens_for(model: nn.Module, inputs: dict[str, Tensor], **arguments: object) -> Tensor:
    ids = inputs["input_ids"]
    return generated(model, ids, torch.ones_like(ids), **arguments)


@torch.no_grad()
def both_tasks(library: Library, name: str) -> None:
    model = library.two_tasks(make_base(library, name))
    ids = make_inputs(name)["input_ids"]
    alone = []
    for task in (0, 1):
        library.switch(model, task)
        alone.append(model(ids).logits)
    together = library.both_tasks(model, ids)
    check(all(not torch.allclose(together, one, atol=1e-2) for one in alone), "one of them is not seen")


def plain_torch(library: Library, name: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = library.plain_torch(nn.TransformerEncoder(layer, 2)).eval()
    model(torch.randn(2, 5, 32)).square().mean().backward()
    prefixes = [p for n, p in model.named_parameters() if "prefix" in n]
    check(bool(prefixes) and all(p.grad.any() for p in prefixes), "no prefix that is trained")


class Row(NamedTuple):
    """A want, the probe that tries it, and the models on which it is tried."""

    want: str
    probe: Probe
    models: tuple[str, ...]
    # Packages beside the library's.
    needs: tuple[str, ...] = ()


EVERY_SECOND = [(1,), (0,), (1,)]
ROWS = [
    Row("train a classifier", trains, tuple(ENCODERS)),
    Row("train a masked-LM head", masked_lm, ("BERT", "DistilBERT", "ModernBERT")),
    Row("train a decoder", trains, tuple(DECODERS)),
    Row("train an encoder-decoder", trains, tuple(ENCODER_DECODERS)),
    Row("train on images", trains, tuple(IMAGES)),
    Row("an image beside the text", reads_images, tuple(IMAGES_BESIDE_TEXT)),
    Row("layers whose keys have different shapes", trains_and_generates, ("Gemma 4", "Gemma 4 of fewer global heads")),
    Row(
        "key heads wider than hidden size / heads",
        trains_and_generates,
        ("wide Qwen3", "wide Gemma 3"),
    ),
    Row("a mixture of experts", trains_and_generates, ("Mixtral", "Qwen3-MoE")),
    Row("latent attention, as in DeepSeek-V3", trains_and_generates, ("DeepSeek-V3",)),
    Row("a hybrid with attention in some layers", trains_and_generates, ("Qwen3-Next", "LFM2")),
    Row("train on weights quantised to int8 by `torchao`", on_quantized_weights, ("BERT", "Llama"), ("torchao",)),
    Row("train a model built of `torch.nn` alone", plain_torch, ("nn.TransformerEncoder",)),
    Row(
        "right padding, with the default attention",
        right_padding,
        ("BERT", "GPT-2", "Llama"),
    ),
    Row("use every position that the model has", every_position, ("BERT", "GPT-2")),
    Row("`torch.compile` without graph breaks", compiles, ("BERT", "Llama", "T5")),
    Row("gradient checkpointing, non-reentrant", checkpointing(False), ("BERT", "Llama", "T5")),
    Row("gradient checkpointing, reentrant", checkpointing(True), ("BERT", "Llama", "T5")),
    Row("gradient checkpointing switched on before the prefix is added", checkpointing_first, ("BERT", "Llama")),
    Row("float32 prefix on a bfloat16 model", half_precision, ("BERT", "Llama")),
    Row("`Trainer` resumes from its checkpoint", resumes(with_mlp=False), ("Llama",)),
    Row("the same, with a prefix that an MLP generates", resumes(with_mlp=True), ("Llama",)),
    Row("train LoRA beside the prefix", with_lora, ("Llama",)),
    Row("train DoRA beside the prefix", with_dora, ("BERT", "Llama"), ("peft",)),
    Row("`generate`: greedy", generates(), ("GPT-2", "Llama", "BART")),
    Row("`generate`: left padding", generates(padding=3), ("GPT-2", "Llama")),
    Row("`generate`: left padding, a sliding window", generates(padding=3), ("Mistral", "Gemma 3")),
    Row("`generate`: 3 beams", generates(num_beams=3), ("GPT-2", "Llama", "BART")),
    Row("`generate`: static cache", generates(cache_implementation="static", disable_compile=True), ("GPT-2", "Llama")),
    Row("prefixes at encoder, decoder and cross-attention", all_attentions, ("BART",)),
    Row("a prefix in some layers only", in_one_layer, ("Llama",)),
    Row("a length for each layer", of_uneven_lengths, ("Llama",)),
    Row("first tokens that stay frozen", first_token_frozen, ("Llama",)),
    Row("dropout of the prefix", with_dropout, ("Llama",)),
    Row("a prefix that begins as the keys and values of a text", from_text, ("Llama",)),
    Row("several tasks on one model, switched by name", switches, ("Llama",)),
    Row("a batch whose rows do different tasks", mixed_batch(EVERY_SECOND, logits_for), ("GPT-2", "Llama", "BART")),
    Row("`generate` such a batch", mixed_batch(EVERY_SECOND, tokens_for), ("GPT-2", "Llama", "BART")),
    Row("two prefixes at once, such as task and user", both_tasks, ("Llama",)),
    Row("a batch with one prefix in some rows, two in others", mixed_batch([(0, 1), (0,)], logits_for), ("Llama",)),
]
