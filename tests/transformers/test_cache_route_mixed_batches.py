"""Batches whose rows have different prefixes before what the key/value cache holds (``attention="cache"``)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from cached_prefixes import prepared
from transformers import PreTrainedModel

from benchmarks.compatibility.model_types import tiny_model
from prefix_kernels.integrations.transformers import (
    get_named_prefix,
    load_named_prefix,
    remove_prefix,
    save_prefix_model,
    select_prefixes,
    set_prefix,
    use_prefixes,
)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


@pytest.fixture
def two_tasks(tmp_path: Path, request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of the parametrized type with the tasks "default" of 4 tokens and "long" of 6."""
    base = tiny_model("causal", request.param)
    save_prefix_model(prepared(base, 6, init_std=1.0), tmp_path / "long.safetensors")
    model = prepared(base)
    load_named_prefix(model, "long", tmp_path / "long.safetensors")
    return model


def _joined(model: PreTrainedModel, names: list[str]) -> PreTrainedModel:
    """Return a model with one task, whose prefix is those of ``names`` one after another."""
    table = torch.cat([get_named_prefix(model, name).table.detach() for name in names])
    single = remove_prefix(copy.deepcopy(model))
    single = prepared(single, table.shape[0])
    with torch.no_grad():
        single.prefix_encoder.table.copy_(table)
    return single


@pytest.mark.parametrize("two_tasks", ["bloom", "gptj", "gpt_neo", "falcon"], indirect=True)
def test_rows_of_a_batch_see_different_prefixes(two_tasks: PreTrainedModel) -> None:
    model = two_tasks
    ids = torch.randint(3, 90, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    names = ["default", "long", None, ["long", "default"], "default"]
    mixed = model(input_ids=ids, attention_mask=mask, prefix_names=names).logits
    for row, name in enumerate(names):
        wanted = [name] if isinstance(name, str) else name
        one = remove_prefix(copy.deepcopy(model)) if wanted is None else _joined(model, wanted)
        expected = one(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
        seen = mask[row, :, None]
        torch.testing.assert_close(mixed[row] * seen, expected * seen, rtol=0, atol=1e-5)

    arguments = {"input_ids": ids, "attention_mask": mask}
    selection = select_prefixes(model, names)
    torch.testing.assert_close(model(**arguments, prefix_names=selection).logits, mixed)
    with use_prefixes(model, names):
        torch.testing.assert_close(model(**arguments).logits, mixed)
    hidden = model.base_model(**arguments, prefix_names=names).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), mixed)
    tokens = model.generate(**arguments, prefix_names=names, max_new_tokens=3, do_sample=False, eos_token_id=None)
    set_prefix(model, "long")
    alone = model.generate(ids[1:2], attention_mask=mask[1:2], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens[1], alone[0])
    # A call that fails leaves nothing open.
    with pytest.raises(ValueError, match="prefix_names: expected one entry for each of the 5 rows"):
        model(**arguments, prefix_names=["default"])
    with pytest.raises(ValueError, match="prefix_names: expected names among"):
        model(**arguments, prefix_names=["nothing"] * 5)
    torch.testing.assert_close(model(**arguments).logits[1], mixed[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("two_tasks", ["gptj"], indirect=True)
def test_a_mixed_batch_trains_the_tasks_that_its_rows_name(two_tasks: PreTrainedModel) -> None:
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    get_named_prefix(two_tasks, "long").requires_grad_(True)
    loss = two_tasks(input_ids=ids, prefix_names=["long", "default"]).logits.square().sum()
    loss.backward()
    for row, name in enumerate(["long", "default"]):
        single = _joined(two_tasks, [name])
        single(input_ids=ids[row : row + 1]).logits.square().sum().backward()
        torch.testing.assert_close(
            get_named_prefix(two_tasks, name).table.grad, single.prefix_encoder.table.grad, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("two_tasks", ["mvp"], indirect=True)
def test_rows_whose_positions_cannot_differ_are_refused(two_tasks: PreTrainedModel) -> None:
    ids = torch.randint(3, 90, (2, 7))
    with pytest.raises(ValueError, match=r"expected prefixes of one length for all rows.*begin at \[4, 6\]"):
        two_tasks(input_ids=ids, prefix_names=["default", "long"])
    assert two_tasks(input_ids=ids, prefix_names=["long", "long"]).logits.isfinite().all()
