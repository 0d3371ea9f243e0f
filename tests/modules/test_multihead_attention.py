"""PrefixMultiheadAttention stands in for torch.nn.MultiheadAttention: arguments, results, gradients and errors."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prefix_kernels.nn.multihead_attention
from prefix_kernels.nn.prefix_tuning_attention import PrefixMultiheadAttention

BATCH, Q_LEN, K_LEN, EMBED, HEADS, PREFIX = 3, 4, 5, 12, 2, 3
HEAD_DIM = EMBED // HEADS

SOURCES = ("self", "memory", "separate", "unbatched")
ATTN_MASKS = ("none", "2-D bool", "2-D float", "3-D bool", "3-D float")
PADDINGS = ("none", "bool", "float")
WEIGHTS = ("none", "averaged", "per head")


def make_inputs(source: str, *, batch_first: bool, kdim: int, vdim: int) -> list[Tensor]:
    """Query, key and value, the same object where ``source`` says so."""
    batch = () if source == "unbatched" else (BATCH,)

    def draw(length: int, features: int) -> Tensor:
        shape = (*batch, length, features) if batch_first or not batch else (length, *batch, features)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    query = draw(Q_LEN, EMBED)
    if source == "self":
        return [query] * 3
    key = draw(K_LEN, kdim)
    return [query, key, key if source == "memory" else draw(K_LEN, vdim)]


def make_masks(source: str, attn_mask: str, padding: str) -> dict[str, Tensor]:
    """Masks under which every query sees the first key."""
    batch = 1 if source == "unbatched" else BATCH
    k_len = Q_LEN if source == "self" else K_LEN
    masks = {}
    if attn_mask != "none":
        shape = (Q_LEN, k_len) if attn_mask.startswith("2-D") else (batch * HEADS, Q_LEN, k_len)
        hidden = torch.rand(shape) < 0.3
        hidden[..., 0] = False
        added = torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -math.inf)
        masks["attn_mask"] = hidden if attn_mask.endswith("bool") else added
    if padding != "none":
        hidden = torch.arange(k_len) >= torch.randint(1, k_len, (batch, 1))
        added = torch.randn(batch, k_len, dtype=torch.float64).masked_fill(hidden, -math.inf)
        mask = hidden if padding == "bool" else added
        masks["key_padding_mask"] = mask[0] if source == "unbatched" else mask
    return masks


def make_pair(**options) -> tuple[nn.MultiheadAttention, PrefixMultiheadAttention]:
    plain = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)  # torch starts biases at zero
    ours = PrefixMultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def call_kwargs(weights: str) -> dict[str, bool]:
    return {"need_weights": weights != "none", "average_attn_weights": weights != "per head"}


def results_and_gradients(module: nn.Module, inputs: list[Tensor], **kwargs) -> list[Tensor]:
    """Output, weights where asked for, and the gradients of a loss that uses both, for inputs and parameters."""
    results = [tensor for tensor in module(*inputs, **kwargs) if tensor is not None]
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, dtype=r.dtype, generator=generator)).sum() for r in results)
    leaves = [*dict.fromkeys(inputs), *module.parameters()]
    return results + list(torch.autograd.grad(loss, leaves))


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def assert_same_as_torch(
    source: str, attn_mask: str, padding: str, weights: str, *, train: bool = True, kdim=None, vdim=None, **options
) -> None:
    if source == "self":
        kdim = vdim = None
    elif source == "memory":
        vdim = kdim
    plain, ours = make_pair(kdim=kdim, vdim=vdim, **options)
    plain.train(train)
    ours.train(train)
    batch_first = options.get("batch_first", False)
    inputs = make_inputs(source, batch_first=batch_first, kdim=kdim or EMBED, vdim=vdim or EMBED)
    kwargs = make_masks(source, attn_mask, padding) | call_kwargs(weights)
    assert_all_close(results_and_gradients(ours, inputs, **kwargs), results_and_gradients(plain, inputs, **kwargs))
    with torch.no_grad():  # where torch's own fused path may run
        assert_all_close(
            [r for r in ours(*inputs, **kwargs) if r is not None],
            [r for r in plain(*inputs, **kwargs) if r is not None],
        )


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("attn_mask", ATTN_MASKS)
@pytest.mark.parametrize("source", SOURCES)
def test_without_prefix_it_equals_torch_for_every_call(source, attn_mask, padding, weights):
    assert_same_as_torch(source, attn_mask, padding, weights)


CONSTRUCTORS = [
    {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero, "batch_first": first, **dims}
    for bias, bias_kv, zero, first, dims in itertools.product(
        *[(True, False)] * 4, ({}, {"kdim": 7}, {"vdim": 9}, {"kdim": 7, "vdim": 9})
    )
]


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_without_prefix_it_equals_torch_for_every_constructor(options):
    assert_same_as_torch("separate", "3-D float", "float", "per head", **options)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@settings(max_examples=100)
@given(
    st.sampled_from(SOURCES),
    st.sampled_from(ATTN_MASKS),
    st.sampled_from(PADDINGS),
    st.sampled_from(WEIGHTS),
    st.sampled_from(CONSTRUCTORS),
    st.booleans(),
)
def test_without_prefix_it_equals_torch_for_any_mixture(source, attn_mask, padding, weights, options, train):
    assert_same_as_torch(source, attn_mask, padding, weights, train=train, **options)


def concatenated(
    module: PrefixMultiheadAttention, query: Tensor, key: Tensor, value: Tensor, added: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, batch first: project, concatenate a copy of the prefix per row, softmax."""
    in_weight, in_bias, batch = module.in_proj_weight, module.in_proj_bias, query.shape[0]
    rows = []
    for x, weight, bias in zip((query, key, value), in_weight.chunk(3), in_bias.chunk(3), strict=True):
        rows.append((x @ weight.T + bias).view(batch, -1, HEADS, HEAD_DIM).transpose(1, 2))
    q, k, v = rows
    extra = []
    if module.bias_k is not None:
        extra.append([b.view(1, HEADS, 1, HEAD_DIM).expand(batch, -1, -1, -1) for b in (module.bias_k, module.bias_v)])
    if module.add_zero_attn:
        extra.append([torch.zeros_like(k[:, :, :1])] * 2)
    prefix = [p.expand(batch, -1, -1, -1) for p in (module.prefix_key, module.prefix_value)]
    keys = torch.cat([prefix[0], k, *(e[0] for e in extra)], dim=2)
    values = torch.cat([prefix[1], v, *(e[1] for e in extra)], dim=2)
    mask = nn.functional.pad(added.expand(batch, -1, q.shape[2], -1), (module.num_prefix_tokens, len(extra)))
    weights = (q @ keys.mT / HEAD_DIM**0.5 + mask).softmax(-1)
    out = (weights @ values).transpose(1, 2).flatten(2)
    return out @ module.out_proj.weight.T + module.out_proj.bias, weights


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("add_bias_kv", "add_zero_attn"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("batch_first", [True, False])
def test_with_a_prefix_it_equals_the_concatenation(batch_first, add_bias_kv, add_zero_attn, weights):
    module = PrefixMultiheadAttention(
        EMBED,
        HEADS,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        batch_first=batch_first,
        dtype=torch.float64,
        num_prefix_tokens=PREFIX,
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    inputs = make_inputs("separate", batch_first=batch_first, kdim=EMBED, vdim=EMBED)
    masks = make_masks("separate", "2-D float", "float")
    added = masks["attn_mask"] + masks["key_padding_mask"][:, None, None, :]

    class Definition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Tensor, need_weights: bool, average_attn_weights: bool, **masks: Tensor):
            out, p = concatenated(module, *(x if batch_first else x.transpose(0, 1) for x in inputs), added)
            p = p.mean(1) if average_attn_weights else p
            return out if batch_first else out.transpose(0, 1), p if need_weights else None

    kwargs = masks | call_kwargs(weights)
    assert_all_close(
        results_and_gradients(module, inputs, **kwargs), results_and_gradients(Definition(), inputs, **kwargs)
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("num_prefix_tokens", [0, PREFIX])
def test_the_causal_hint_gives_what_the_causal_mask_gives(num_prefix_tokens, padding, weights):
    module = PrefixMultiheadAttention(EMBED, HEADS, dtype=torch.float64, num_prefix_tokens=num_prefix_tokens)
    inputs = make_inputs("self", batch_first=False, kdim=EMBED, vdim=EMBED)
    kwargs = make_masks("self", "none", padding) | call_kwargs(weights)
    kwargs["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(Q_LEN, dtype=torch.float64)
    hinted = results_and_gradients(module, inputs, is_causal=True, **kwargs)
    assert_all_close(hinted, results_and_gradients(module, inputs, **kwargs))


def test_the_causal_hint_counts_both_sequences_from_their_start():
    """As torch does, whose causal mask is aligned at the top left."""
    plain, ours = make_pair()
    inputs = make_inputs("memory", batch_first=False, kdim=EMBED, vdim=EMBED)
    mask = torch.ones(Q_LEN, K_LEN, dtype=torch.bool).triu(1)
    torch.testing.assert_close(
        ours(*inputs, attn_mask=mask, is_causal=True, need_weights=False)[0], plain(*inputs, attn_mask=mask)[0]
    )


def test_nothing_of_the_size_of_the_batch_is_made_of_the_prefix_and_no_score_matrix_of_a_padding_mask(monkeypatch):
    module = PrefixMultiheadAttention(EMBED, HEADS, dtype=torch.float64, num_prefix_tokens=PREFIX)
    seen = {}

    def record(query, key, value, prefix_key, prefix_value, attn_mask, *args, **kwargs):
        seen.update(locals())
        return original(query, key, value, prefix_key, prefix_value, attn_mask, *args, **kwargs)

    original = prefix_kernels.nn.multihead_attention.prefix_attention
    monkeypatch.setattr(prefix_kernels.nn.multihead_attention, "prefix_attention", record)
    x = torch.randn(K_LEN, BATCH, EMBED, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(K_LEN, dtype=torch.float64)
    padding = torch.zeros(BATCH, K_LEN, dtype=torch.bool)
    module(x, x, x, key_padding_mask=padding, attn_mask=causal, is_causal=True, need_weights=False)
    assert seen["prefix_key"] is module.prefix_key
    assert seen["prefix_value"] is module.prefix_value
    assert seen["attn_mask"].shape == (BATCH, 1, 1, K_LEN)
    assert seen["key"].shape == (BATCH, HEADS, K_LEN, HEAD_DIM)
    # Key and value are views of one projection; the query, which may be all that is saved, does not keep it alive.
    assert seen["key"].untyped_storage().data_ptr() == seen["value"].untyped_storage().data_ptr()
    assert seen["query"].untyped_storage().nbytes() == x.nbytes


def test_weights_sum_to_one_and_show_the_attention_to_the_prefix():
    module = PrefixMultiheadAttention(EMBED, HEADS, num_prefix_tokens=PREFIX, dtype=torch.float64)
    x = torch.randn(Q_LEN, BATCH, EMBED, dtype=torch.float64)
    with torch.no_grad():
        module.prefix_key[:, 1] = 1e3 * torch.randn(HEADS, HEAD_DIM)
    weights = module(x, x, x, average_attn_weights=False)[1]
    assert weights.shape == (BATCH, HEADS, Q_LEN, PREFIX + Q_LEN)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, HEADS, Q_LEN, dtype=torch.float64))
    assert ((weights[..., 1] > 0.99) | (weights[..., 1] < 0.01)).all()


def test_a_query_that_sees_no_key_gives_the_output_bias_and_weights_of_zero():
    module = PrefixMultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    nn.init.normal_(module.out_proj.bias)
    x = torch.randn(Q_LEN, BATCH, EMBED, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(Q_LEN, Q_LEN, dtype=torch.bool)
    hidden[2] = True
    out, weights = module(x, x, x, attn_mask=hidden)
    assert torch.equal(out[2], module.out_proj.bias.expand(BATCH, -1))
    assert not weights[:, 2].any()
    (out.sum() + weights.square().sum()).backward()
    assert x.grad.isfinite().all()


def test_attention_dropout_acts_in_training_on_the_output_and_not_on_the_weights():
    module = PrefixMultiheadAttention(EMBED, HEADS, dropout=1.0, num_prefix_tokens=PREFIX)
    nn.init.normal_(module.out_proj.bias)
    x = torch.randn(Q_LEN, BATCH, EMBED)
    out, weights = module.train()(x, x, x)
    eval_out, eval_weights = module.eval()(x, x, x)
    torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))
    assert not torch.allclose(eval_out, out)
    torch.testing.assert_close(weights, eval_weights)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_sum_to_one_as_closely_as_their_own_rounding_allows(dtype, autocast):
    """Large scores, so that scores rounded to the lower precision would not do."""
    module = PrefixMultiheadAttention(EMBED, HEADS, num_prefix_tokens=PREFIX)
    x = 10 * torch.randn(Q_LEN, BATCH, EMBED)
    if not autocast:
        module, x = module.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        weights = module(x, x, x, average_attn_weights=False)[1]
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(BATCH, HEADS, Q_LEN), rtol=0, atol=0.004)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_stay_near_float64(dtype):
    module = PrefixMultiheadAttention(EMBED, HEADS, num_prefix_tokens=PREFIX).to(dtype)
    x = torch.randn(Q_LEN, BATCH, EMBED).to(dtype)
    out, weights = module(x, x, x)
    assert out.dtype == weights.dtype == module.prefix_key.dtype == dtype
    exact_out, exact_weights = module.double()(x.double(), x.double(), x.double())
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=0.03)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=0, atol=0.01)


def test_autocast_runs_it_in_the_lower_precision_with_a_float32_prefix():
    module = PrefixMultiheadAttention(EMBED, HEADS, num_prefix_tokens=PREFIX)
    x = torch.randn(Q_LEN, BATCH, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(Q_LEN)
    exact = module(x, x, x, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(x, x, x, attn_mask=mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact[0], rtol=0, atol=0.03)
    torch.testing.assert_close(weights.float(), exact[1], rtol=0, atol=0.01)
    out.sum().backward()
    assert module.prefix_value.grad.dtype == torch.float32
    assert module.prefix_value.grad.any()


@pytest.mark.parametrize("num_prefix_tokens", [0, PREFIX])
def test_it_compiles_without_graph_breaks_to_the_same_results(num_prefix_tokens):
    module = PrefixMultiheadAttention(EMBED, HEADS, dtype=torch.float64, num_prefix_tokens=num_prefix_tokens)
    inputs = make_inputs("self", batch_first=False, kdim=EMBED, vdim=EMBED)
    kwargs = make_masks("self", "2-D float", "float")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_all_close(results_and_gradients(compiled, inputs, **kwargs), results_and_gradients(module, inputs, **kwargs))


def test_gradients_pass_gradcheck():
    module = PrefixMultiheadAttention(4, 2, add_bias_kv=True, dtype=torch.float64, num_prefix_tokens=2)
    x = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    names = ("prefix_key", "prefix_value", "bias_k")
    hidden = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, state, (x, x, x), {"attn_mask": hidden})

    parameters = [module.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, (x, *parameters))


# Constructing, copying, storing.


def test_a_swapped_in_module_shares_frozen_weights_and_trains_its_prefix_alone():
    plain = nn.MultiheadAttention(EMBED, HEADS, 0.1, kdim=7, vdim=9, add_bias_kv=True, batch_first=True).eval()
    swapped = PrefixMultiheadAttention.from_multihead_attention(plain, PREFIX)
    assert isinstance(swapped, nn.MultiheadAttention)
    assert not swapped.training
    assert swapped.dropout == 0.1
    for name, parameter in plain.named_parameters():
        assert swapped.get_parameter(name) is parameter
    trainable = {name: p.shape for name, p in swapped.named_parameters() if p.requires_grad}
    assert trainable == dict.fromkeys(("prefix_key", "prefix_value"), (HEADS, PREFIX, HEAD_DIM))


@pytest.mark.parametrize("options", CONSTRUCTORS[::3], ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_a_module_swapped_in_without_a_prefix_computes_what_the_old_one_did(options):
    plain, _ = make_pair(**options)
    swapped = PrefixMultiheadAttention.from_multihead_attention(plain, 0)
    inputs = make_inputs(
        "separate",
        batch_first=options["batch_first"],
        kdim=options.get("kdim", EMBED),
        vdim=options.get("vdim", EMBED),
    )
    assert_all_close(list(swapped(*inputs)), list(plain(*inputs)))


def test_a_prefix_may_be_kept_in_float32_on_a_bfloat16_module():
    plain = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.bfloat16)
    swapped = PrefixMultiheadAttention.from_multihead_attention(plain, PREFIX, prefix_dtype=torch.float32)
    x = torch.randn(Q_LEN, BATCH, EMBED, dtype=torch.bfloat16)
    out, weights = swapped(x, x, x)
    out.sum().backward()
    assert out.dtype == weights.dtype == torch.bfloat16
    assert swapped.prefix_value.grad.dtype == torch.float32


def test_plain_state_dicts_load_with_only_the_prefix_missing():
    plain = nn.MultiheadAttention(EMBED, HEADS, add_bias_kv=True)
    ours = PrefixMultiheadAttention(EMBED, HEADS, add_bias_kv=True, num_prefix_tokens=PREFIX)
    assert ours.state_dict().keys() - plain.state_dict().keys() == {"prefix_key", "prefix_value"}
    result = ours.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(result.missing_keys) == ["prefix_key", "prefix_value"]
    assert not result.unexpected_keys
    without = PrefixMultiheadAttention(EMBED, HEADS, add_bias_kv=True)
    assert without.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(dict(ours.named_parameters())["in_proj_weight"], plain.in_proj_weight)


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same_and_share_nothing(copied):
    module = PrefixMultiheadAttention(EMBED, HEADS, num_prefix_tokens=PREFIX)
    x = torch.randn(Q_LEN, BATCH, EMBED)
    duplicate = copied(module)
    assert_all_close(list(duplicate(x, x, x)), list(module(x, x, x)))
    before = module(x, x, x)[0]
    nn.init.ones_(duplicate.prefix_value)
    assert torch.equal(module(x, x, x)[0], before)


def test_parameters_can_be_drawn_anew():
    module = PrefixMultiheadAttention(EMBED, HEADS, num_prefix_tokens=PREFIX)
    before = {name: p.clone() for name, p in module.named_parameters()}
    module._reset_parameters()
    for name in ("in_proj_weight", "prefix_key", "prefix_value"):
        assert not torch.equal(module.get_parameter(name), before[name])
    assert not module._qkv_same_embed_dim


# Errors.


class OtherAttention(nn.MultiheadAttention):
    def forward(self, query, key, value):
        return query


@pytest.mark.parametrize(
    ("mha", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "expected a torch.nn.MultiheadAttention, got Linear"),
        (lambda: OtherAttention(4, 2), TypeError, "got OtherAttention"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
            TypeError,
            "parametrised",
        ),
        (lambda: PrefixMultiheadAttention(4, 2, num_prefix_tokens=3), ValueError, "one of 3 tokens"),
    ],
)
def test_what_cannot_be_swapped_is_refused(mha, error, message):
    with pytest.raises(error, match=message):
        PrefixMultiheadAttention.from_multihead_attention(mha(), 2)


def test_a_negative_number_of_prefix_tokens_is_refused():
    with pytest.raises(ValueError, match="num_prefix_tokens: expected at least 0, got -1"):
        PrefixMultiheadAttention(4, 2, num_prefix_tokens=-1)


X = torch.zeros(Q_LEN, BATCH, EMBED)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0, 0], X, X), {}, ValueError, r"query: expected \[L, 12\] or 3-D with 12 features, got \[12\]"),
        ((X[..., :5], X, X), {}, ValueError, r"query: .* 12 features, got \[4, 3, 5\]"),
        ((X, X[..., :5], X), {}, ValueError, r"key: expected 3-D like the query, with 12 features, got \[4, 3, 5\]"),
        ((X, X, X[0]), {}, ValueError, r"value: expected 3-D like the query, with 12 features, got \[3, 12\]"),
        ((X, X, X[:2]), {}, ValueError, r"value: expected \[4, 3, 12\] to fit the key, got \[2, 3, 12\]"),
        ((X, X[:, :1], X[:, :1]), {}, ValueError, r"key: expected a batch of 3 in dimension 1.*got \[4, 1, 12\]"),
        ((X, X, X), {"is_causal": True}, ValueError, "attn_mask: expected the causal mask"),
        ((X, X, X), {"attn_mask": torch.zeros(4, 4, requires_grad=True)}, ValueError, "attn_mask: .* detach"),
        ((X, X, X), {"attn_mask": torch.zeros(4, 5)}, ValueError, r"attn_mask: expected \[4, 4\] or \[6, 4, 4\], got"),
        ((X, X, X), {"attn_mask": torch.zeros(3, 4, 4)}, ValueError, r"got \[3, 4, 4\]"),
        ((X, X, X), {"key_padding_mask": torch.zeros(4, 3)}, ValueError, r"key_padding_mask: expected \[3, 4\], got"),
        ((X, X, X), {"attn_mask": torch.zeros(4, 4, dtype=torch.int64)}, TypeError, "attn_mask: expected bool or"),
        ((X, X, X), {"key_padding_mask": torch.zeros(3, 4, dtype=torch.uint8)}, TypeError, "key_padding_mask: exp"),
    ],
)
def test_bad_calls_are_refused_by_name(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        PrefixMultiheadAttention(EMBED, HEADS, num_prefix_tokens=PREFIX)(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_outside_batch_first_self_attention():
    rows = [torch.randn(3, EMBED), torch.randn(2, EMBED)]
    strided, other = torch.nested.nested_tensor(rows), torch.nested.nested_tensor(rows)
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    module = PrefixMultiheadAttention(EMBED, HEADS, batch_first=True, num_prefix_tokens=PREFIX)
    for args in ((strided, other, other), (jagged, jagged, jagged)):
        with pytest.raises(ValueError, match="query: expected a padded tensor"):
            module(*args)
    with pytest.raises(ValueError, match="expected None with a nested query"):
        module(strided, strided, strided, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    module.batch_first = False
    with pytest.raises(ValueError, match="query: expected a padded tensor"):
        module(strided, strided, strided)
