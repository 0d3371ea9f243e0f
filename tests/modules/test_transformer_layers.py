"""PrefixMultiheadAttention inside torch.nn's Transformer layers, whose fused inference paths must not bypass it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prefix_kernels.checkpoint import mark_only_prefix_as_trainable
from prefix_kernels.nn.prefix_tuning_attention import PrefixMultiheadAttention

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning"),
]

BATCH, LENGTH, EMBED, HEADS, PREFIX = 3, 5, 8, 2, 3
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
LAYER = {"d_model": EMBED, "nhead": HEADS, "dim_feedforward": 16, "dropout": 0.0, "dtype": torch.float64}
GRAD_MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def swap_all(model: nn.Module) -> list[PrefixMultiheadAttention]:
    """Give every attention of ``model`` a prefix that matters, and freeze the rest."""
    swapped = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.MultiheadAttention:
                attention = PrefixMultiheadAttention.from_multihead_attention(child, PREFIX)
                nn.init.normal_(attention.prefix_key)
                nn.init.normal_(attention.prefix_value)
                setattr(module, name, attention)
                swapped.append(attention)
    mark_only_prefix_as_trainable(model)
    return swapped


def make_encoder(**options) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER, batch_first=True, **options), num_layers=3)


def assert_eval_equals_training_and_sees_every_prefix(
    model: nn.Module, swapped: list[nn.Module], call, modes=GRAD_MODES
) -> None:
    """``call()`` runs ``model`` and gives the outputs that count."""
    model.train()
    expected = call().detach()
    model.eval()
    for mode in modes:
        with mode():
            torch.testing.assert_close(call(), expected)
    with torch.no_grad():
        for attention in swapped:
            kept = attention.prefix_value.clone()
            attention.prefix_value += 1.0
            assert (call() - expected).abs().max() > 1e-3
            attention.prefix_value.copy_(kept)


def test_the_fused_path_would_be_taken_for_a_plain_layer(monkeypatch):
    """What the tests below rely on: their layers are such that torch does not call a plain attention module."""
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True).eval()
    layer.requires_grad_(False)

    def refuse(*args, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(layer.self_attn, "forward", refuse)
    layer(torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64))


@pytest.mark.parametrize(
    "masks",
    [{}, {"src_mask": CAUSAL}, {"src_mask": CAUSAL, "is_causal": True}, {"src_key_padding_mask": PADDING}],
    ids=["unmasked", "causal mask", "causal hint", "padding"],
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_encoder_layer_gives_in_eval_mode_what_it_gives_in_training(batch_first, norm_first, activation, masks):
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=batch_first, norm_first=norm_first, activation=activation)
    swapped = swap_all(layer)
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    assert_eval_equals_training_and_sees_every_prefix(layer, swapped, lambda: layer(x, **masks))


def swapped_after_construction(layers: list[int]) -> tuple[nn.TransformerEncoder, list[PrefixMultiheadAttention]]:
    encoder = make_encoder()
    encoder.requires_grad_(False)
    return encoder, [attention for index in layers for attention in swap_all(encoder.layers[index])]


def swapped_before_construction() -> tuple[nn.TransformerEncoder, list[PrefixMultiheadAttention]]:
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    swap_all(layer)
    encoder = nn.TransformerEncoder(layer, num_layers=3)
    return encoder, [layer.self_attn for layer in encoder.layers]


ENCODERS = {
    "first layer": lambda: swapped_after_construction([0]),
    "last layer": lambda: swapped_after_construction([2]),
    "all layers": lambda: swapped_after_construction([0, 1, 2]),
    "built from a swapped layer": swapped_before_construction,
}


@pytest.mark.parametrize("padding", [None, PADDING], ids=["unpadded", "padded"])
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_an_encoder_gives_in_eval_mode_what_it_gives_in_training(encoder, padding):
    """With a padding mask, torch makes a nested tensor of the batch in eval mode, whose padding comes back as zeros."""
    encoder, swapped = encoder()
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    valid = slice(None) if padding is None else ~padding
    # torch's plain attention refuses nested tensors that require a gradient, as they do above a trainable prefix.
    plain_above = padding is not None and len(swapped) < 3
    assert_eval_equals_training_and_sees_every_prefix(
        encoder,
        swapped,
        lambda: encoder(x, src_key_padding_mask=padding)[valid],
        GRAD_MODES[:2] if plain_above else GRAD_MODES,
    )


def test_plain_layers_above_a_prefix_work_with_gradients_in_eval_mode_without_nested_tensors():
    encoder, swapped = swapped_after_construction([0])
    encoder.use_nested_tensor = False
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    assert_eval_equals_training_and_sees_every_prefix(
        encoder, swapped, lambda: encoder(x, src_key_padding_mask=PADDING)[~PADDING]
    )


def test_the_nested_path_is_what_the_padded_encoder_test_runs(monkeypatch):
    encoder, (attention,) = swapped_after_construction([1])
    seen = []
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda q, *a, **k: (seen.append(q.is_nested), forward(q, *a, **k))[1])
    with torch.no_grad():
        encoder.eval()(torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64), src_key_padding_mask=PADDING)
    assert seen[0]


def test_prefix_gradients_in_eval_mode_equal_those_of_training():
    encoder, swapped = swapped_after_construction([0, 1, 2])
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    prefixes = [p for attention in swapped for p in (attention.prefix_key, attention.prefix_value)]
    gradients = []
    for training in (True, False):
        out = encoder.train(training)(x, src_key_padding_mask=PADDING)[~PADDING]
        gradients.append(torch.autograd.grad(out.square().mean(), prefixes))
    for trained, evaluated in zip(*gradients, strict=True):
        assert trained.any()
        torch.testing.assert_close(evaluated, trained)


def test_a_fully_padded_row_does_no_harm_to_the_others():
    encoder, _ = swapped_after_construction([0, 1, 2])
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    padding = PADDING.clone()
    padding[1] = True
    expected = encoder.train()(x, src_key_padding_mask=padding)[~padding]
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding)[~padding], expected)


@pytest.mark.parametrize("masks", [{}, {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING}])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_decoder_layer_works_with_prefixes_in_both_its_attentions(batch_first, masks):
    layer = nn.TransformerDecoderLayer(**LAYER, batch_first=batch_first)
    swapped = swap_all(layer)
    assert len(swapped) == 2
    x, memory = torch.randn(2, BATCH, LENGTH, EMBED, dtype=torch.float64)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    assert_eval_equals_training_and_sees_every_prefix(layer, swapped, lambda: layer(x, memory, **masks))


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_whole_transformer_works_with_prefixes_everywhere(batch_first):
    model = nn.Transformer(EMBED, HEADS, 2, 2, 16, 0.0, batch_first=batch_first, dtype=torch.float64)
    swapped = swap_all(model)
    assert len(swapped) == 6
    source, target = torch.randn(2, BATCH, LENGTH, EMBED, dtype=torch.float64)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    masks = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING, "tgt_mask": CAUSAL}
    assert_eval_equals_training_and_sees_every_prefix(model, swapped, lambda: model(source, target, **masks))


def test_an_encoder_whose_attention_has_no_prefix_keeps_its_outputs_and_its_fused_path(monkeypatch):
    encoder = make_encoder().eval()
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=PADDING)
        for layer in encoder.layers:
            layer.self_attn = PrefixMultiheadAttention.from_multihead_attention(layer.self_attn, 0)
            monkeypatch.setattr(layer.self_attn, "forward", None)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=PADDING), expected)


def test_a_swapped_encoder_compiles_to_the_same_outputs_in_eval_mode():
    encoder, _ = swapped_after_construction([0, 1, 2])
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    compiled = torch.compile(encoder.eval(), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, mask=CAUSAL, is_causal=True), encoder(x, mask=CAUSAL, is_causal=True))


def test_training_lowers_the_loss_and_moves_the_prefix_alone():
    torch.manual_seed(1)
    encoder, _ = swapped_after_construction([0, 1, 2])
    names = mark_only_prefix_as_trainable(encoder)
    assert sorted(names) == sorted(f"layers.{i}.self_attn.prefix_{kind}" for i in range(3) for kind in ("key", "value"))
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    x = torch.randn(8, LENGTH, EMBED, dtype=torch.float64)
    label = (x.mean((1, 2)) > 0).double()
    optimizer = torch.optim.Adam([p for p in encoder.parameters() if p.requires_grad], lr=0.05)

    def loss_of(out: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(out[:, :, 0].mean(1), label)

    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(encoder.train()(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name
        assert (parameter.grad is not None) == (name in names), name
    with torch.no_grad():
        assert loss_of(encoder.eval()(x)).item() < losses[-2]
