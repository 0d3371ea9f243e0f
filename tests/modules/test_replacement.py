"""Every attention of a plain torch model gets a prefix: replace_multihead_attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prefix_kernels
from prefix_kernels import (
    PrefixMultiheadAttention,
    load_prefix,
    mark_only_prefix_as_trainable,
    replace_multihead_attention,
    restore_multihead_attention,
    save_prefix,
)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

EMBED, HEADS, PREFIX = 8, 2, 3
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)


class ImageBlock(nn.Module):
    """As torchvision's EncoderBlock is built."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(EMBED)
        self.self_attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
        self.ln_2 = nn.LayerNorm(EMBED)
        self.mlp = nn.Sequential(nn.Linear(EMBED, 16), nn.GELU(), nn.Linear(16, EMBED))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class ImageModel(nn.Module):
    """As torchvision's VisionTransformer is built: patches, a class token, blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, EMBED, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, EMBED))
        self.encoder = nn.Sequential(*(ImageBlock() for _ in range(2)))
        self.heads = nn.Sequential(nn.Linear(EMBED, 3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.heads(self.encoder(x)[:, 0])


class TextBlock(nn.Module):
    """As open_clip's ResidualAttentionBlock is built: an additive causal mask, the batch in any dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(EMBED)
        self.attn = nn.MultiheadAttention(EMBED, HEADS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        return x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TextBlock() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x, mask)
        return x.transpose(0, 1)


def make_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def make_transformer() -> nn.Module:
    return nn.Transformer(EMBED, HEADS, 2, 2, 16, dropout=0.0, batch_first=True)


def call_encoder(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 120).sin().view(3, 5, EMBED), src_key_padding_mask=PADDING)[~PADDING]


def call_transformer(model: nn.Module) -> Tensor:
    source, target = torch.linspace(-9, 9, 240).sin().view(2, 3, 5, EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    return model(source, target, tgt_mask=causal, src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], int]] = {
    "nn.TransformerEncoder": (make_encoder, call_encoder, 2),
    "nn.Transformer": (make_transformer, call_transformer, 6),
    "like torchvision": (ImageModel, lambda model: model(torch.linspace(-9, 9, 384).sin().view(2, 3, 8, 8)), 2),
    "like open_clip": (TextModel, lambda model: model(torch.linspace(-9, 9, 80).sin().view(2, 5, EMBED)), 2),
}
over_models = pytest.mark.parametrize(("build", "call", "count"), MODELS.values(), ids=MODELS)


def attentions(model: nn.Module) -> list[PrefixMultiheadAttention]:
    return [module for module in model.modules() if isinstance(module, PrefixMultiheadAttention)]


@over_models
def test_every_attention_has_a_prefix_that_is_seen_in_training_and_evaluation(
    build: Callable, call: Callable, count: int
) -> None:
    model = build()
    plain = call(model.train()).detach()
    assert replace_multihead_attention(model, PREFIX) is model
    assert len(attentions(model)) == count
    assert not any(type(module) is nn.MultiheadAttention for module in model.modules())
    for attention in attentions(model):
        nn.init.normal_(attention.prefix_key)
        nn.init.normal_(attention.prefix_value)
    expected = call(model).detach()
    assert (expected - plain).abs().max() > 1e-2
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(call(model.eval()), expected, rtol=0, atol=1e-5)
    for attention in attentions(model):
        with torch.no_grad():
            kept = attention.prefix_value.clone()
            attention.prefix_value += 1.0
            assert (call(model) - expected).abs().max() > 1e-3
            attention.prefix_value.copy_(kept)


@over_models
def test_the_prefix_trains_and_no_weight_moves(build: Callable, call: Callable, count: int) -> None:
    model = replace_multihead_attention(build(), PREFIX)
    names = mark_only_prefix_as_trainable(model)
    assert len(names) == 2 * count
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        call(model.train()).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name


@over_models
def test_the_state_dict_keeps_its_keys_and_the_inverse_restores_all(
    build: Callable, call: Callable, count: int
) -> None:
    model = build().eval()
    model.requires_grad_(True)
    frozen = next(module for module in model.modules() if isinstance(module, nn.MultiheadAttention)).in_proj_bias
    frozen.requires_grad_(False)
    with torch.no_grad():
        expected = call(model)
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]

    replace_multihead_attention(model, PREFIX)
    replaced = model.state_dict()
    assert [key for key in replaced if not key.endswith(("prefix_key", "prefix_value"))] == list(state)
    assert all(torch.equal(replaced[key], tensor) for key, tensor in state.items())
    for attention in attentions(model):
        own = [name for name, parameter in attention.named_parameters() if parameter.requires_grad]
        assert own == ["prefix_key", "prefix_value"]

    for one in (copy.deepcopy(model), model):
        assert restore_multihead_attention(one) is one
        assert list(one.state_dict()) == list(state)
        assert [parameter.requires_grad for parameter in one.parameters()] == flags
        with torch.no_grad():
            torch.testing.assert_close(call(one), expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_task_is_saved_and_loaded(tmp_path: Path) -> None:
    base = ImageModel()
    model = replace_multihead_attention(copy.deepcopy(base), PREFIX)
    mark_only_prefix_as_trainable(model, also_train=("heads",))
    nn.init.normal_(model.heads[0].weight)
    save_prefix(model, tmp_path / "task.safetensors")
    other = replace_multihead_attention(base, PREFIX)
    load_prefix(other, tmp_path / "task.safetensors")
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(other(images), model(images))


def test_a_module_in_two_places_keeps_being_one() -> None:
    model = TextModel()
    model.blocks[1].attn = model.blocks[0].attn
    replace_multihead_attention(model, PREFIX)
    assert model.blocks[0].attn is model.blocks[1].attn and len(attentions(model)) == 1


def test_settings_of_an_attention_survive_there_and_back() -> None:
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(EMBED, HEADS, 0.1, add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=4)}
    ).eval()
    query, key, value = torch.randn(5, 2, EMBED), torch.randn(4, 2, 6), torch.randn(4, 2, 4)
    expected = model["a"](query, key, value)
    restored = restore_multihead_attention(replace_multihead_attention(model, PREFIX))["a"]
    assert type(restored) is nn.MultiheadAttention and restored.dropout == 0.1 and not restored.training
    for result, before in zip(restored(query, key, value), expected, strict=True):
        torch.testing.assert_close(result, before)


def test_a_bfloat16_model_takes_float32_prefixes() -> None:
    model = replace_multihead_attention(ImageModel().to(torch.bfloat16), PREFIX, prefix_dtype=torch.float32)
    assert attentions(model)[0].prefix_key.dtype == torch.float32
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0]


def hooked() -> nn.Module:
    model = TextModel()
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    return model


def one_of_a_kind() -> nn.Module:
    model = TextModel()
    model.blocks[1].attn = OwnAttention(EMBED, HEADS)
    return model


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), ValueError, "model: expected a MultiheadAttention in it, got Linear without any"),
        (lambda: nn.MultiheadAttention(EMBED, HEADS), ValueError, "got a MultiheadAttention itself; see"),
        (
            lambda: replace_multihead_attention(TextModel(), PREFIX),
            ValueError,
            "blocks.0.attn: mha: expected a module without a prefix, got one of 3 tokens",
        ),
        (hooked, ValueError, "blocks.1.attn: expected an attention without hooks, which would be lost"),
        (one_of_a_kind, TypeError, "blocks.1.attn: mha: expected a torch.nn.MultiheadAttention, got OwnAttention"),
    ],
)
def test_what_cannot_be_replaced_is_named_and_nothing_is_changed(
    build: Callable, error: type[Exception], message: str
) -> None:
    model = build()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modules = list(model.modules())
    with pytest.raises(error, match=message):
        replace_multihead_attention(model, PREFIX)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_prefix_tokens: expected at least 1, got 0"):
        replace_multihead_attention(TextModel(), 0)
    with pytest.raises(ValueError, match="expected a PrefixMultiheadAttention in it, got TextModel without any"):
        restore_multihead_attention(TextModel())


def test_both_are_exported() -> None:
    assert {"replace_multihead_attention", "restore_multihead_attention"} <= set(prefix_kernels.__all__)
