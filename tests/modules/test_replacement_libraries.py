"""replace_multihead_attention on the models of torchvision and open_clip, where these are installed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prefix_kernels import (
    PrefixMultiheadAttention,
    load_prefix,
    mark_only_prefix_as_trainable,
    replace_multihead_attention,
    restore_multihead_attention,
    save_prefix,
)

VISION = {"image_size": 16, "patch_size": 8, "layers": 2, "width": 16, "head_width": 8}
TEXT = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
IMAGES = torch.linspace(-99, 99, 3 * 3 * 16 * 16).sin().view(3, 3, 16, 16)
# A row without padding, one with, and one that ends at once.
TEXTS = torch.tensor([[7, 8, 9, 4, 5, 49], [3, 4, 49, 0, 0, 0], [49, 0, 0, 0, 0, 0]])


def make_torchvision() -> nn.Module:
    pytest.importorskip("torchvision")
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # zeros by default, past which no gradient comes
    return model


def make_clip(**vision: object) -> nn.Module:
    pytest.importorskip("open_clip")
    import open_clip

    return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**VISION, **vision), open_clip.CLIPTextCfg(**TEXT))


def make_coca() -> nn.Module:
    """Cross-attention, pooling by attention with keys of another width, and a mask of every row and head."""
    pytest.importorskip("open_clip")
    from open_clip.coca_model import CoCa, MultimodalCfg

    model = CoCa(
        16,
        multimodal_cfg=MultimodalCfg(**TEXT),
        text_cfg={**TEXT, "context_length": 6, "embed_cls": True, "output_tokens": True},
        vision_cfg={**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
        | {"output_tokens": True},
    )
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip leaves it as the memory was
    return model


def images(model: nn.Module) -> Tensor:
    """The images in the dtype of the model's parameters."""
    return IMAGES.to(next(model.parameters()).dtype)


def call_clip(model: nn.Module) -> Tensor:
    image_features, text_features, scale = model(images(model), TEXTS)[:3]
    return torch.cat([image_features, text_features]) * scale


def call_coca(model: nn.Module) -> Tensor:
    result = model(images(model), TEXTS)
    return torch.cat([result[name].flatten() for name in ("image_features", "text_features", "logits")])


Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], int, str]
CASES: dict[str, Case] = {
    "torchvision.VisionTransformer": (make_torchvision, lambda model: model(images(model)), 2, "heads"),
    "open_clip.CLIP": (make_clip, call_clip, 4, "ln_final"),
    "open_clip.CLIP, pooled by attention": (
        lambda: make_clip(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=3),
        call_clip,
        5,
        "ln_post",
    ),
    "open_clip.CoCa": (make_coca, call_coca, 9, "text_decoder.ln_final"),
}
over_cases = pytest.mark.parametrize(("build", "call", "count", "head"), CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _same_models() -> None:
    torch.manual_seed(0)


def attentions(model: nn.Module, kind: type[nn.Module]) -> Iterator[nn.MultiheadAttention]:
    return (module for module in model.modules() if type(module) is kind)


def replaced(model: nn.Module, num_prefix_tokens: int) -> nn.Module:
    """With prefixes large enough to matter."""
    replace_multihead_attention(model, num_prefix_tokens)
    for attention in attentions(model, PrefixMultiheadAttention):
        nn.init.normal_(attention.prefix_key)
        nn.init.normal_(attention.prefix_value)
    return model


@over_cases
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_prefix_of_one_token_does_what_torchs_bias_k_and_bias_v_do(
    build: Callable, call: Callable, count: int, head: str, training: bool
) -> None:
    # In float64, where torch's fused kernels and these differ by less than any gradient's last digits.
    theirs = build().double().train(training)
    ours = replaced(copy.deepcopy(theirs), 1)
    # torch's own attention, too, takes one more key and value that every query sees.
    pairs = list(
        zip(attentions(theirs, nn.MultiheadAttention), attentions(ours, PrefixMultiheadAttention), strict=True)
    )
    assert len(pairs) == count
    for attention, other in pairs:
        attention.bias_k = nn.Parameter(other.prefix_key.detach().reshape(1, 1, -1))
        attention.bias_v = nn.Parameter(other.prefix_value.detach().reshape(1, 1, -1))
    results = [call(model) for model in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0])
    for result in results:
        result.square().sum().backward()
    for attention, other in pairs:
        for grad, expected in ((other.prefix_key.grad, attention.bias_k), (other.prefix_value.grad, attention.bias_v)):
            assert expected.grad.abs().max() > 0
            torch.testing.assert_close(grad.reshape(1, 1, -1), expected.grad)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(call(ours), results[1].detach())


@over_cases
def test_the_prefixes_and_the_chosen_head_train_and_nothing_else_moves(
    build: Callable, call: Callable, count: int, head: str, tmp_path: Path
) -> None:
    base = build()
    model = replace_multihead_attention(copy.deepcopy(base), 3)
    names = mark_only_prefix_as_trainable(model, also_train=(head,))
    assert sum(name.endswith(("prefix_key", "prefix_value")) for name in names) == 2 * count < len(names)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    call(model.train()).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name

    save_prefix(model, tmp_path / "task.safetensors")
    load_prefix(replace_multihead_attention(base, 3), tmp_path / "task.safetensors")
    torch.testing.assert_close(call(base.eval()), call(model.eval()))


@over_cases
def test_a_plain_checkpoint_loads_and_the_inverse_gives_back_the_model(
    build: Callable, call: Callable, count: int, head: str
) -> None:
    model, other = build().eval(), build().eval()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        expected = call(model)
    state = copy.deepcopy(model.state_dict())

    missing, unexpected = replaced(other, 3).load_state_dict(state, strict=False)
    assert not unexpected and len(missing) == 2 * count
    with torch.no_grad():
        assert (call(other) - expected).abs().max() > 1e-2
        restore_multihead_attention(other)
        torch.testing.assert_close(call(other), expected)
    assert other.state_dict().keys() == state.keys()
    assert [parameter.requires_grad for parameter in other.parameters()] == flags


def test_torchvisions_feature_extractor_takes_the_attention_for_a_leaf() -> None:
    model = replaced(make_torchvision(), 3).eval()
    from torchvision.models.feature_extraction import create_feature_extractor

    leaves = {"leaf_modules": [PrefixMultiheadAttention]}
    extractor = create_feature_extractor(model, ["encoder.ln", "heads"], tracer_kwargs=leaves)
    torch.testing.assert_close(extractor(IMAGES)["heads"], model(IMAGES))


def test_open_clips_checkpointing_gives_the_same_gradients() -> None:
    model = replaced(make_clip(), 3)
    mark_only_prefix_as_trainable(model)
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        call_clip(model.train()).square().sum().backward()
        grads.append([a.prefix_key.grad.clone() for a in attentions(model, PrefixMultiheadAttention)])
    torch.testing.assert_close(grads[1], grads[0])


def test_a_clip_in_bfloat16_takes_float32_prefixes() -> None:
    model = make_clip()
    import open_clip

    open_clip.convert_weights_to_lp(model, torch.bfloat16)
    replace_multihead_attention(model, 3, prefix_dtype=torch.float32)
    features = model.encode_image(IMAGES.bfloat16()), model.encode_text(TEXTS)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in features)
    sum(x.float().square().sum() for x in features).backward()
    for attention in attentions(model, PrefixMultiheadAttention):
        assert attention.prefix_key.grad.dtype == torch.float32 and attention.prefix_key.grad.abs().max() > 0
