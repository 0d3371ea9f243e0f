"""Batched gradients and the transforms of ``torch.func``: what works equals the oracle's, the rest is refused."""

import pytest
import torch
from helpers import INPUT_NAMES, make_call
from torch.autograd import forward_ad, gradcheck
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from prefix_kernels import PrefixMultiheadAttention, prefix_attention
from prefix_kernels.reference import prefix_attention_reference

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "additive mask": {"attn_mask": torch.linspace(-1, 1, 5, dtype=torch.float64)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])},
    "bank": {"num_prefixes": 2, "prefix_ids": torch.tensor([[1, 0], [-1, 1]])},
}
ALL = tuple(range(5))


def small_inputs(**options):
    call = make_call(q_heads=2, kv_heads=1, q_len=3, k_len=5, prefix_len=2, head_dim=4, dtype=torch.float64, **options)
    return [call.inputs[name].contiguous() for name in INPUT_NAMES], call.options


def loss(attention, options):
    return lambda *inputs: attention(*inputs, **options).sin().sum()


def assert_all_close(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_batched_gradients(options):
    inputs, options = small_inputs(**options)
    leaves = [x.requires_grad_() for x in inputs]
    assert gradcheck(lambda *x: prefix_attention(*x, **options, return_lse=True), leaves, check_batched_grad=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_grad(options):
    inputs, options = small_inputs(**options)
    for argnums in (ALL, (3,), (3, 4), (0, 2)):
        ours = grad(loss(prefix_attention, options), argnums)(*inputs)
        assert_all_close(ours, grad(loss(prefix_attention_reference, options), argnums)(*inputs))


@pytest.mark.parametrize("in_dims", [0, -1])
def test_vmap_of_grad_gives_the_gradients_of_each_element(in_dims):
    inputs, options = small_inputs()
    batched = [torch.stack([x, 1.1 * x, 0.9 * x], dim=in_dims) for x in inputs]
    ours = vmap(grad(loss(prefix_attention, options), ALL), in_dims=in_dims)(*batched)
    for i in range(3):
        elements = [x.select(in_dims, i) for x in batched]
        expected = grad(loss(prefix_attention_reference, options), ALL)(*elements)
        assert_all_close([x[i] for x in ours], expected)


def test_vmap_over_prefixes_alone():
    (query, key, value, prefix_key, prefix_value), _ = small_inputs()
    banks = [torch.stack([x, -x]) for x in (prefix_key, prefix_value)]
    ours = vmap(lambda k, v: prefix_attention(query, key, value, k, v))(*banks)
    expected = [prefix_attention(query, key, value, banks[0][i], banks[1][i]) for i in range(2)]
    torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=0)


def test_jacrev_vjp_and_the_vectorised_jacobian():
    inputs, _ = small_inputs()
    expected = jacrev(prefix_attention_reference, ALL)(*inputs)
    assert_all_close(jacrev(prefix_attention, ALL)(*inputs), expected)
    vectorised = torch.autograd.functional.jacobian(prefix_attention, tuple(inputs), vectorize=True)
    assert_all_close(vectorised, expected)
    out, pull_back = vjp(lambda *x: prefix_attention(*x, return_lse=True), *inputs)
    _, pull_back_expected = vjp(lambda *x: prefix_attention_reference(*x, return_lse=True), *inputs)
    cotangents = tuple(torch.randn_like(x) for x in out)
    assert_all_close(pull_back(cotangents), pull_back_expected(cotangents))


def test_batched_gradients_of_a_module():
    module = PrefixMultiheadAttention(8, 2, num_prefix_tokens=3, dtype=torch.float64)
    x = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)
    out = module(x, x, x, need_weights=False)[0]
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    parameters = [x, module.prefix_key, module.prefix_value]
    batched = torch.autograd.grad(out, parameters, cotangents, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(out, parameters, cotangents[i], retain_graph=True)
        assert_all_close([x[i] for x in batched], expected)


def test_per_sample_gradients_of_a_module():
    module = PrefixMultiheadAttention(8, 2, num_prefix_tokens=3, batch_first=True, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    samples = torch.randn(3, 4, 8, dtype=torch.float64)

    def sample_loss(parameters, x):
        x = x.unsqueeze(0)
        return torch.func.functional_call(module, parameters, (x, x, x))[0].sin().sum()

    ours = vmap(grad(sample_loss), in_dims=(None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        for name, expected in grad(sample_loss)(parameters, sample).items():
            torch.testing.assert_close(ours[name][i], expected)


def test_dropout_under_vmap_follows_its_randomness():
    inputs, _ = small_inputs()
    queries = torch.stack([inputs[0], inputs[0]])

    def dropped(query):
        return prefix_attention(query, *inputs[1:], dropout_p=0.5)

    same = vmap(dropped, randomness="same")(queries)
    assert torch.equal(same[0], same[1])
    different = vmap(dropped, randomness="different")(queries)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="random"):
        vmap(dropped)(queries)


def jacobian_of_head_sums(attention, options):
    return jacrev(lambda *inputs: attention(*inputs, **options).sin().sum((0, 2, 3)))


@pytest.mark.parametrize(
    "transform",
    [lambda *arguments: grad(loss(*arguments)), jacobian_of_head_sums],
    ids=["grad", "jacrev"],
)
def test_compiled_code_may_hold_a_transform(transform):
    inputs, options = small_inputs()
    compiled = torch.compile(transform(prefix_attention, options), backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), transform(prefix_attention_reference, options)(*inputs))


@pytest.mark.parametrize("transform", [grad, jacrev], ids=["grad", "jacrev"])
def test_a_transform_does_not_compile_into_one_graph(transform):
    torch.compiler.reset()  # the compiled code of a transform is kept for every function that it is called with
    inputs, options = small_inputs()
    compiled = torch.compile(transform(loss(prefix_attention, options)), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="forward_under_transform"):
        compiled(*inputs)


@pytest.mark.parametrize("derivative", ["hessian", "grad of grad", "jvp", "jvp of the mask", "dual mask", "double"])
def test_what_has_no_formula_is_refused(derivative):
    inputs, options = small_inputs()
    mask = torch.zeros(5, dtype=torch.float64)
    of_query = loss(lambda query: prefix_attention(query, *inputs[1:], **options), {})

    def call():
        if derivative == "hessian":
            return hessian(of_query)(inputs[0])
        if derivative == "grad of grad":
            return grad(lambda query: grad(of_query)(query).sum())(inputs[0])
        if derivative == "jvp":
            return jvp(of_query, (inputs[0],), (inputs[0],))
        if derivative == "jvp of the mask":
            return jvp(lambda mask: prefix_attention(*inputs, mask), (mask,), (mask + 1,))
        if derivative == "dual mask":
            with forward_ad.dual_level():
                return prefix_attention(*inputs, forward_ad.make_dual(mask, mask + 1))
        query = inputs[0].requires_grad_()
        out = prefix_attention(query, *inputs[1:])
        cotangents = torch.ones(2, *out.shape, dtype=out.dtype)
        gradient = torch.autograd.grad(out, query, cotangents, is_grads_batched=True, create_graph=True)[0]
        return gradient.sum().backward()

    with pytest.raises(NotImplementedError, match="^prefix_attention: "):
        call()


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "inductor"])
def test_a_mask_that_asks_for_a_gradient_is_refused(backend):
    inputs, _ = small_inputs()
    mask = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def attention(mask):
        return prefix_attention(*inputs, mask)

    attention_as_run = attention if backend is None else torch.compile(attention, backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="attn_mask: expected a mask that does not require a gradient"):
        attention_as_run(mask)
    with pytest.raises(ValueError, match="attn_mask: expected a mask that does not require a gradient"):
        grad(lambda mask: attention(mask).sum())(mask.detach())
    with torch.no_grad():
        torch.testing.assert_close(attention(mask), prefix_attention(*inputs))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_refuses_a_mask_that_asks_for_a_gradient(compiled):
    module = PrefixMultiheadAttention(8, 2, num_prefix_tokens=3)
    run = torch.compile(module, backend="aot_eager") if compiled else module
    x = torch.randn(4, 2, 8)
    with pytest.raises((ValueError, RuntimeError), match="attn_mask: expected a mask that does not require a gradient"):
        run(x, x, x, attn_mask=torch.zeros(4, 4, requires_grad=True))


def test_a_saved_tensor_hook_may_return_out_with_other_strides():
    call = make_call(q_heads=4, kv_heads=2, q_len=6, k_len=9, layout="contiguous")
    leaves = [call.inputs[name].requires_grad_() for name in INPUT_NAMES]
    dout = call.dout.to(torch.float32)
    expected = torch.autograd.grad(prefix_attention(*leaves), leaves, dout)
    out_shape = expected[0].shape

    def unpack(saved):
        is_out = saved.shape == out_shape and saved.stride() != leaves[0].stride()
        return saved.mT.contiguous().mT if is_out else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        out = prefix_attention(*leaves)
    assert_all_close(torch.autograd.grad(out, leaves, dout), expected)


def test_a_saved_tensor_hook_that_returns_keys_with_other_strides_is_told():
    call = make_call(q_heads=4, kv_heads=2, q_len=6, k_len=9, layout="contiguous")
    leaves = [call.inputs[name].requires_grad_() for name in INPUT_NAMES]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x.mT.contiguous().mT if x.shape == leaves[1].shape else x
    ):
        out = prefix_attention(*leaves)
    with pytest.raises(ValueError, match="key: expected stride 1 in the last dimension"):
        out.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "backward through vmap"])
def test_transforms_under_autocast(transform):
    inputs, _ = small_inputs()
    inputs = [x.float() for x in inputs]
    batched = [torch.stack([x, 1.1 * x]) for x in inputs]

    def of_inputs(*inputs):
        return prefix_attention(*inputs).float().sin().sum()

    def expected(*inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(of_inputs(*leaves), leaves)

    with torch.autocast("cpu", torch.bfloat16):
        if transform == "grad":
            assert_all_close(grad(of_inputs, ALL)(*inputs), expected(*inputs))
        elif transform == "vmap of grad":
            ours = vmap(grad(of_inputs, ALL))(*batched)
            for i in range(2):
                assert_all_close([x[i] for x in ours], expected(*(x[i] for x in batched)))
        else:
            leaves = [x.requires_grad_() for x in batched]
            ours = torch.autograd.grad(vmap(of_inputs)(*leaves).sum(), leaves)
            for i in range(2):
                assert_all_close([x[i] for x in ours], expected(*(x[i].detach() for x in batched)))


def test_vmap_over_an_empty_batch():
    inputs, _ = small_inputs()
    empty = [x.new_zeros(0, *x.shape) for x in inputs]
    assert vmap(prefix_attention)(*empty).shape == (0, *inputs[0].shape)
    ours = vmap(grad(loss(prefix_attention, {}), ALL))(*empty)
    assert [x.shape for x in ours] == [x.shape for x in empty]
