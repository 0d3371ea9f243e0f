"""Batches without padding, as DataCollatorWithFlattening makes them: packed sequences reach the packed kernels."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import decoder_families
import pytest
import torch
from family_checks import Family, prepared, tables
from named_tasks import Tasks
from tiny_models import tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, DataCollatorWithFlattening

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    save_prefix_model,
    select_prefixes,
)
from prefix_kernels.integrations.transformers.attention import masks
from prefix_kernels.integrations.transformers.runtime.packed_rows import found_packed_rows, told_packed_rows

LENGTHS = (7, 1, 5)
# What a batch may tell: positions that restart, where each sequence begins, or both.
TOLD = ("position_ids", "cu_seq_lens", "both")


def modernbert() -> Family:
    def model(**settings: object) -> torch.nn.Module:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        tokens = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
        windows = {"global_attn_every_n_layers": 2, "local_attention": 4}
        others = {"sep_token_id": 2, "initializer_range": 0.3, "max_position_embeddings": 64}
        config = AutoConfig.for_model("modernbert", **(sizes | tokens | windows | others | settings))
        return AutoModelForMaskedLM.from_config(config).eval()

    return Family("modernbert", model, decoder_families.batch, decoder_families.labels)


FAMILIES = [*decoder_families.FAMILIES, modernbert()]
of_each = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def sequences() -> list[Tensor]:
    return [torch.randint(3, 97, (length,)) for length in LENGTHS]


def flattened(rows: list[Tensor], told: str = "both") -> dict[str, Tensor]:
    """The batch that Transformers' collator makes of ``rows``, without labels."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=told != "position_ids", return_tensors="pt")
    batch = collator([{"input_ids": row.tolist()} for row in rows])
    batch.pop("labels")
    if told == "cu_seq_lens":
        batch.pop("position_ids")
    return batch


def one_by_one(model: torch.nn.Module, rows: list[Tensor]) -> Tensor:
    return torch.cat([model(row[None]).logits for row in rows], 1)


@pytest.mark.parametrize("told", TOLD)
@of_each
def test_sequences_of_a_flattened_batch_give_what_each_gives_alone(
    family: Family, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = prepared(family, family.model()), sequences()
    alone = one_by_one(model, rows)
    cotangent = torch.randn_like(alone)
    expected = torch.autograd.grad((alone * cotangent).sum(), tables(model))

    def no_mask(*_: object, **__: object) -> None:
        raise AssertionError("a mask of Sq x Sk was made")

    monkeypatch.setattr(masks, "sdpa_mask", no_mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # A new cache is no hindrance where the batch tells where sequences begin.
        more = {} if told != "position_ids" or family.name == "modernbert" else {"use_cache": False}
        logits = model(**flattened(rows, told), **more).logits
    torch.testing.assert_close(logits, alone, rtol=0, atol=2e-5)
    for ours, reference in zip(torch.autograd.grad((logits * cotangent).sum(), tables(model)), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window_includes_prefix", [False, True])
@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name in ("mistral", "gemma3_text", "modernbert")])
def test_windows_of_packed_sequences(family: Family, window_includes_prefix: bool) -> None:
    model = prepared(family, family.model(), window_includes_prefix=window_includes_prefix)
    rows = sequences()
    torch.testing.assert_close(model(**flattened(rows)).logits, one_by_one(model, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_sequence_sees_the_prefix_that_is_named_for_it(family: str, told: str, tmp_path: Path) -> None:
    tasks, rows = Tasks(tmp_path, tiny_model(family, AutoModelForCausalLM)), sequences()
    names = ["short", None, "unmoved"]
    expected = torch.cat([tasks.of(name)(row[None]).logits for name, row in zip(names, rows, strict=True)], 1)
    batch = flattened(rows, told) | {"use_cache": False}
    torch.testing.assert_close(tasks.model(**batch, prefix_names=names).logits, expected, rtol=0, atol=2e-5)
    selection = select_prefixes(tasks.model, names)
    torch.testing.assert_close(tasks.model(**batch, prefix_names=selection).logits, expected, rtol=0, atol=2e-5)


def test_positions_that_go_on_after_the_shift_are_two_sequences(tmp_path: Path) -> None:
    """Behind a prefix of 2, a sequence of 3 ends at position 4; behind one of 5 the next begins at 5."""
    tasks = Tasks(tmp_path, tiny_model("llama", AutoModelForCausalLM))
    rows = [torch.randint(3, 97, (3,)), torch.randint(3, 97, (4,))]
    names = ["short", "default"]
    expected = torch.cat([tasks.of(name)(row[None]).logits for name, row in zip(names, rows, strict=True)], 1)
    batch = flattened(rows, "position_ids") | {"use_cache": False}
    torch.testing.assert_close(tasks.model(**batch, prefix_names=names).logits, expected, rtol=0, atol=2e-5)


def test_the_number_of_names_is_that_of_the_sequences(tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, tiny_model("llama", AutoModelForCausalLM))
    with pytest.raises(ValueError, match=r"prefix_names: expected one entry for each of the 3 .*, got 2"):
        tasks.model(**flattened(sequences()), prefix_names=["short", None])


def test_every_row_of_a_batch_may_hold_several_sequences() -> None:
    model = get_prefix_model(tiny_model("llama", AutoModelForCausalLM), PrefixTuningConfig(num_virtual_tokens=5))
    rows = [torch.randint(3, 97, (length,)) for length in (4, 3, 2, 5)]
    batch = {"input_ids": torch.stack([torch.cat(rows[:2]), torch.cat(rows[2:])]), "use_cache": False}
    positions = torch.stack([torch.cat([torch.arange(len(row)) for row in pair]) for pair in (rows[:2], rows[2:])])
    logits = model(**batch, position_ids=positions).logits
    torch.testing.assert_close(logits.flatten(0, 1)[None], one_by_one(model, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_flattened_batches_are_trained_with_activation_checkpointing(use_reentrant: bool) -> None:
    family = next(one for one in FAMILIES if one.name == "llama")
    model, rows = prepared(family, family.model(attention_dropout=0.0)), sequences()
    batch = flattened(rows) | {"use_cache": False}
    model.train()
    model(**batch).logits.sum().backward()
    expected = [table.grad for table in tables(model)]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch).logits.sum().backward()
    for table, reference in zip(tables(model), expected, strict=True):
        torch.testing.assert_close(table.grad, reference)


def test_flattened_batches_of_other_lengths_run_in_one_graph() -> None:
    family = next(one for one in FAMILIES if one.name == "llama")
    model = prepared(family, family.model())
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ((7, 2, 5), (4, 6, 9, 3), (3, 8)):
        rows = [torch.randint(3, 97, (length,)) for length in lengths]
        batch = flattened(rows) | {"use_cache": False}
        torch.testing.assert_close(compiled(**batch).logits, one_by_one(model, rows), rtol=0, atol=2e-5)
    assert len(graphs) == 1


def test_an_epoch_of_flattened_batches_has_the_losses_of_padded_ones() -> None:
    """Trained on both, the prefix is the same to rounding."""
    family = next(one for one in FAMILIES if one.name == "llama")
    torch.manual_seed(1)
    base = family.model()
    examples = [torch.randint(3, 97, (int(length),)) for length in torch.randint(2, 12, (16,))]

    def losses(flat: bool) -> list[float]:
        torch.manual_seed(0)
        model = prepared(family, base)
        optimizer = torch.optim.AdamW(tables(model), lr=0.05)
        collator, found = DataCollatorWithFlattening(return_tensors="pt"), []
        for start in range(0, len(examples), 4):
            rows = examples[start : start + 4]
            if flat:
                batch = collator([{"input_ids": row.tolist()} for row in rows])
            else:
                padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
                batch = {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    padded, flat = losses(False), losses(True)
    torch.testing.assert_close(flat, padded, rtol=1e-4, atol=1e-4)
    assert padded[-1] != padded[0]


def test_bert_takes_the_lengths_that_a_batch_tells() -> None:
    """Its mask is made outside of its layers."""
    model = get_prefix_model(tiny_model("bert", AutoModelForMaskedLM), PrefixTuningConfig(num_virtual_tokens=5))
    rows = sequences()
    torch.testing.assert_close(model(**flattened(rows)).logits, one_by_one(model, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 13, dtype=torch.long)}, "attention_mask: expected None with cu_seq_lens_q"),
        ({"cu_seq_lens_k": None}, r"cu_seq_lens_q, cu_seq_lens_k: expected .* got \(\[4\], None\)"),
        ({"cu_seq_lens_k": torch.tensor([0, 1, 8, 13])}, "cu_seq_lens_k: expected the values of cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 8, 12])}, "cu_seq"),
    ],
)
def test_bad_lengths_are_refused(changes: dict[str, object], message: str) -> None:
    model = get_prefix_model(tiny_model("llama", AutoModelForCausalLM), PrefixTuningConfig(num_virtual_tokens=5))
    batch = flattened(sequences()) | {"use_cache": False}
    if "cu_seq_lens_q" in changes:
        changes = changes | {"cu_seq_lens_k": changes["cu_seq_lens_q"]}
    with pytest.raises((ValueError, IndexError), match=message):
        model(**batch | changes)


def test_a_model_that_numbers_its_tokens_by_itself_refuses_lengths() -> None:
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 99}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", is_encoder_decoder=False, **sizes))
    get_prefix_model(model, PrefixTuningConfig(num_virtual_tokens=5))
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected a model that takes position_ids, got BartDecoder"):
        model(**flattened(sequences(), "cu_seq_lens"), use_cache=False)


def test_on_a_gpu_positions_that_restart_become_a_mask_and_lengths_alone_are_refused() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        starts = torch.zeros(4, dtype=torch.int32, device="cuda")
    told = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    assert told_packed_rows(told | {"position_ids": torch.arange(3)[None]}) is None
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q: expected a tensor on a CPU, .* got cuda"):
        told_packed_rows(told)


def test_a_cache_of_earlier_tokens_is_refused_with_lengths() -> None:
    model = get_prefix_model(tiny_model("llama", AutoModelForCausalLM), PrefixTuningConfig(num_virtual_tokens=5))
    cache = model(torch.randint(3, 97, (1, 4)), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: expected no tokens with cu_seq_lens_q, got 4"):
        model(**flattened(sequences()), past_key_values=cache)


def test_the_packed_model_is_stored_and_copied(tmp_path: Path) -> None:
    model = get_prefix_model(tiny_model("llama", AutoModelForCausalLM), PrefixTuningConfig(num_virtual_tokens=5))
    save_prefix_model(model, tmp_path / "task.safetensors")
    rows = sequences()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**flattened(rows)).logits, one_by_one(model, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("positions", "starts"),
    [
        ([[0, 1, 2, 0, 1]], [0, 3, 5]),
        ([[2, 3, 4, 5]], None),
        ([[0, 1, 5, 6]], [0, 2, 4]),
        ([[0, 1, 0], [5, 6, 7]], [0, 2, 3, 6]),
        ([[0, 0, 0]], [0, 1, 2, 3]),
    ],
)
def test_sequences_begin_where_positions_do_not_go_on(positions: list[list[int]], starts: list[int] | None) -> None:
    found = found_packed_rows(torch.tensor(positions), len(positions))
    assert (None if found is None else found.starts.tolist()) == starts
