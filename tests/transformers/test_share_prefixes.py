"""`share_prefixes`: the tokens that rows have in common run once, and nothing else changes."""

from __future__ import annotations

import copy
import logging
import pickle

import peft
import pytest
import torch
from decoder_families import FAMILIES
from family_checks import Family
from tiny_models import tiny_model, without_dropout
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from prefix_kernels.integrations.transformers import (
    PrefixTuningConfig,
    get_prefix_model,
    remove_prefix,
    share_prefixes,
    unshare_prefixes,
)
from prefix_kernels.integrations.transformers.runtime.prefix_tree import prefix_tree

HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 2, "head_dim": 8}
of_each = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
LLAMA = next(one for one in FAMILIES if one.name == "llama")


def groups(padding: str = "both") -> dict[str, Tensor]:
    """Two prompts of 11 and 9 tokens, three responses of up to 5 each, one of them twice; and a row of its own.

    ``both``: prompts padded on the left, responses on the right, as TRL has them; ``left``: all of it on the left;
    ``right``: on the right.
    """
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    first, second = tokens(11), tokens(9)
    response = tokens(4)
    rows = [(first, tokens(5)), (second, tokens(3)), (first, response), (first, response), (second, tokens(1))]
    rows += [(second, []), (tokens(6), tokens(5))]
    input_ids, mask = torch.zeros(len(rows), 16, dtype=torch.long), torch.zeros(len(rows), 16, dtype=torch.long)
    for i, (prompt, answer) in enumerate(rows):
        row = torch.tensor(prompt + answer)
        begin = {"both": 11 - len(prompt), "left": 16 - len(row), "right": 0}[padding]
        input_ids[i, begin : begin + len(row)], mask[i, begin : begin + len(row)] = row, 1
    return {"input_ids": input_ids, "attention_mask": mask}


def labels(batch: dict[str, Tensor]) -> Tensor:
    # What comes first is predicted by padding on its left, where no model's output means anything.
    shown = batch["attention_mask"]
    return batch["input_ids"].masked_fill((shown == 0) | (shown.cumsum(1) == 1), -100)


def results(model: PreTrainedModel, batch: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Logits of tokens, the loss, and the gradients of everything that is trained."""
    model.zero_grad()
    output = model(**batch, labels=labels(batch), use_cache=False, **options)
    output.loss.backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.requires_grad and x.grad is not None}
    return {"loss": output.loss, "logits": output.logits[batch["attention_mask"] == 1]} | grads


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=tolerance * max(1.0, x.abs().max().item()), msg=name)


def computed(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the debug log."""
    return [record.getMessage() for record in caplog.records if record.name == "prefix_kernels.share_prefixes"]


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "prefix_kernels.share_prefixes")


@pytest.mark.parametrize("padding", ["both", "left", "right"])
@of_each
def test_logits_loss_and_gradients_of_all_parameters(
    family: Family, padding: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Eager attention, of which Gemma 2 alone has the softcap, masks with numbers that are infinite in float64.
    in_float32 = family.name == "gemma2"
    model, batch = family.model().to(torch.float32 if in_float32 else torch.float64), groups(padding)
    expected = results(model, batch)
    assert share_prefixes(model) is model
    got = results(model, batch)
    shares_nothing = padding == "left" and family.name != "opt"  # equal tokens at other positions are others
    assert ("tokens are computed" in computed(caplog)[-1]) or shares_nothing
    # Root mean squares and rotations are computed in float32 whatever the dtype.
    assert_same(got, expected, 1e-4 if in_float32 else 1e-6)
    unshare_prefixes(model)
    assert_same(results(model, batch), expected, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    exact = LLAMA.model().double()
    batch, model = groups(), copy.deepcopy(exact).to(dtype)
    reference, plain = results(exact, batch), results(model, batch)
    shared = results(share_prefixes(model), batch)
    for name, x in reference.items():
        error, known = ((y[name].double() - x).abs().max() for y in (shared, plain))
        assert error <= 3 * known + 1e-6 * x.abs().max(), name


def test_each_token_is_computed_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = share_prefixes(LLAMA.model()), groups()
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape))
    model(**batch, use_cache=False)
    # 11 + 5 + 4 (once), 9 + 3 + 1, 6 + 5
    assert lengths == [(1, 44, 32)]
    assert computed(caplog) == ["LlamaModel: 44 of 88 tokens are computed"]


@pytest.mark.parametrize("trained", ["prefix", "prefix and heads of a classifier"])
@pytest.mark.parametrize("shared_first", [False, True])
def test_a_prefix_before_the_shared_prompt(trained: str, shared_first: bool) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=5)
    auto_class = AutoModelForCausalLM if trained == "prefix" else AutoModelForSequenceClassification
    base, batch = tiny_model("llama", auto_class).double(), groups("right")

    def trained_on(model: PreTrainedModel) -> dict[str, Tensor]:
        if trained == "prefix":
            return results(model, batch)
        model.zero_grad()
        output = model(**batch, labels=torch.arange(7) % 3, use_cache=False)
        output.loss.backward()
        grads = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
        return {"loss": output.loss, "logits": output.logits} | grads

    plain = get_prefix_model(copy.deepcopy(base), config)
    expected = trained_on(plain)
    if shared_first:
        model = get_prefix_model(share_prefixes(copy.deepcopy(base)), config)
        model.prefix_encoder.load_state_dict(plain.prefix_encoder.state_dict())
    else:
        model = share_prefixes(copy.deepcopy(plain))
    assert_same(trained_on(model), expected, 1e-6)
    unshare_prefixes(model)
    assert_same(trained_on(model), expected, 1e-6)
    remove_prefix(model)
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, batch = without_dropout(LLAMA.model().double()).train(), groups()
    expected = results(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_same(results(share_prefixes(model), batch), expected, 1e-6)


def test_compiled_models_share(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = LLAMA.model().double(), groups()
    expected = results(model, batch)
    share_prefixes(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    output = compiled(**batch, labels=labels(batch), use_cache=False)
    output.loss.backward()
    assert "tokens are computed" in computed(caplog)[-1] and counter.frame_count > 0
    torch.testing.assert_close(output.loss, expected["loss"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-6 * (1 + expected[name].abs().max()))


def test_hidden_states_logits_to_keep_and_tuples() -> None:
    model, batch = LLAMA.model().double(), groups("right")
    shown = batch["attention_mask"] == 1
    options = {"output_hidden_states": True, "use_cache": False}
    expected, kept = model(**batch, **options), model(**batch, logits_to_keep=3, use_cache=False).logits
    share_prefixes(model)
    got = model(**batch, **options)
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[shown], theirs[shown])
        assert not ours[~shown].any()
    last = model(**batch, logits_to_keep=3, use_cache=False).logits
    torch.testing.assert_close(last[shown[:, -3:]], kept[shown[:, -3:]])
    as_tuple = model(**batch, return_dict=False, use_cache=False)
    torch.testing.assert_close(as_tuple[0][shown], expected.logits[shown])


def test_positions_of_the_caller_decide_with_the_tokens() -> None:
    model, batch = LLAMA.model().double(), groups("left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = results(model, batch | {"position_ids": positions})
    lengths = []
    share_prefixes(model)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert_same(results(model, batch | {"position_ids": positions}), expected, 1e-6)
    assert lengths == [44]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_cache": True}, "it keeps a cache"),
        ({"input_ids": None, "inputs_embeds": torch.randn(7, 16, 32)}, "it has inputs_embeds"),
        ({"attention_mask": torch.ones(7, 1, 16, 16, dtype=torch.bool).tril()}, r"its mask is no padding [B, S]"),
        ({"input_ids": torch.arange(3, 83).view(5, 16), "attention_mask": None}, "its rows have too little in common"),
        ({"input_ids": torch.arange(3, 19)[None], "attention_mask": None}, "it has one row"),
    ],
)
def test_other_calls_run_as_they_are(changes: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = LLAMA.model(), groups("right") | {"use_cache": False} | changes
    expected = model(**batch).logits
    torch.testing.assert_close(share_prefixes(model)(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert computed(caplog) == [f"LlamaModel: the batch runs as it is: {reason}"]


def test_generation_and_rows_that_name_prefixes_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = LLAMA.model(), groups("left")
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(share_prefixes(model).generate(**batch, max_new_tokens=4, do_sample=False), expected)
    prepared = share_prefixes(get_prefix_model(LLAMA.model(), PrefixTuningConfig(num_virtual_tokens=5)))
    prepared(**groups(), prefix_names=["default", None] * 3 + [None], use_cache=False)
    assert computed(caplog)[-1].endswith("its rows name prefixes, or record keys")


def test_a_copy_shares_too(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = share_prefixes(LLAMA.model()), groups()
    expected = model(**batch, use_cache=False).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch, use_cache=False).logits, expected)
        unshare_prefixes(other)
        assert len(computed(caplog)) > 0
        caplog.clear()
        other(**batch, use_cache=False)
        assert not computed(caplog)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("bert", {}, "its attentions see later tokens"),
        ("qwen3_next", HYBRID, "its layers mix tokens otherwise than by attention"),
        ("bart", {"d_model": 32}, "BartDecoder takes no input_ids, attention_mask and position_ids"),
    ],
)
def test_models_that_cannot_share_are_refused(model_type: str, settings: dict[str, object], reason: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=99, **sizes | settings))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"{model_type}.* cannot share: {reason}"):
        share_prefixes(model)
    assert model.config._attn_implementation == before


def test_sharing_twice_or_ending_what_never_began_is_refused() -> None:
    model = LLAMA.model()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not share; share_prefixes\(model\) lets it"):
        unshare_prefixes(model)
    share_prefixes(model)
    with pytest.raises(ValueError, match=r"shares already; unshare_prefixes\(model\) ends it"):
        share_prefixes(model)
    with pytest.raises(TypeError, match="model: expected a transformers.PreTrainedModel, got Linear"):
        share_prefixes(torch.nn.Linear(2, 2))


def test_lora_beside_a_shared_prompt() -> None:
    model = peft.get_peft_model(LLAMA.model().double(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = groups()
    expected = results(model, batch)
    assert len(expected) == 2 + 8
    share_prefixes(model.base_model.model)
    assert_same(results(model, batch), expected, 1e-6)


def nodes_of(rows: list[list[int]], padding: list[list[int]] | None = None) -> list[tuple[list[int], list[int]]]:
    """The tokens of each node of the tree of ``rows``, and its ancestors."""
    ids = torch.tensor(rows)
    shown = None if padding is None else torch.tensor(padding).bool()
    tree = prefix_tree(ids, torch.arange(ids.shape[1])[None], shown)
    tokens = ids.flatten()[tree.tokens]
    kept = torch.ones_like(ids, dtype=torch.bool) if shown is None else shown
    assert torch.equal(tokens[tree.places[kept]], ids[kept]) and (tree.places[~kept] == -1).all()
    assert tree.longest == tree.starts.diff().max()
    parts = tokens.split(tree.starts.diff().tolist())
    return [(p.tolist(), a[a >= 0].tolist()) for p, a in zip(parts, tree.ancestors, strict=True)]


def test_the_tree_of_rows() -> None:
    root, left = list(range(8)), list(range(20, 28))
    rows = [[*root, *left, 1], [*root, *left, 2], [*root, 50, *range(60, 68)], [9] * 17]
    assert nodes_of(rows) == [
        (root, []),
        (left, [0]),
        ([1], [0, 1]),
        ([2], [0, 1]),
        ([50, *range(60, 68)], [0]),
        ([9] * 17, []),
    ]


def test_few_common_tokens_are_no_node() -> None:
    assert nodes_of([[1, 2, 3, 4], [1, 2, 3, 5]]) == [([1, 2, 3, 4], []), ([1, 2, 3, 5], [])]


def test_equal_rows_and_rows_that_end_early_are_one_node() -> None:
    row = list(range(10, 20))
    assert nodes_of([row, row]) == [(row, [])]
    padding = [[1] * 10, [1] * 8 + [0] * 2]
    assert nodes_of([row, row], padding) == [(row[:8], []), (row[8:], [0])]


def test_padding_alone_is_no_node() -> None:
    assert nodes_of([[1, 2, 3], [4, 5, 6]], [[0, 0, 0], [1, 1, 1]]) == [([4, 5, 6], [])]
