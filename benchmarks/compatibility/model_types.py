"""A tiny random model of every model type that Transformers knows, made from its config class."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.compatibility.image_tower import register_image_tower

# Kinds of model, by the name of Transformers' mapping from model types to their classes.
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "audio-text-to-text": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",  # those that read no images
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "speech seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
LARGEST = 4_000_000  # parameters of a model that counts as tiny

_NO_DROPOUT = (
    *("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "dropout_rate"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "resid_dropout", "attn_dropout"),
)
# Each is given to the config classes that have a setting of this name.
_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "hidden_dim", "ffn_dim", "ffn_hidden_size"), 40),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 40),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "max_source_positions"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "global_head_dim", "sliding_window"), 8),
    **dict.fromkeys(_NO_DROPOUT, 0.0),
    "attn_pdrop": 0,
    **{"vocab_size": 99, "vocab_size_per_layer_input": 99, "num_key_value_heads": 2, "rotary_dim": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    # Mixtures of experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    # Latent attention.
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    # Layers without attention.
    **{"mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_d_state": 8},
    **{"ssm_state_size": 8, "n_groups": 1, "mamba_n_groups": 1, "hidden_size_per_layer_input": 8},
    # Images.
    **{"image_size": 16, "patch_size": 8, "num_channels": 3, "embed_dim": 32, "depth": 2, "out_hidden_size": 32},
    **{"projection_dim": 32, "mm_tokens_per_image": 4, "alignment_intermediate_size": 32},
    **{"image_grid_pinpoints": [[16, 16], [32, 16]]},
    **{"projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size_mlp": 40},
    **dict.fromkeys(("attention_heads", "encoder_heads"), 4),
    # Sound.
    **{"conv_dim": [32] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "num_mel_bins": 16},
    **{"input_feat_per_channel": 16, "conv_channels": 32, "classifier_proj_size": 32, "output_hidden_size": 32},
    # Tokens in a text that stand for something else.
    **dict.fromkeys(("image_token_id", "image_token_index"), 95),
    **dict.fromkeys(("video_token_id", "video_token_index"), 96),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), 94),
    **dict.fromkeys(("vision_start_token_id", "boi_token_id", "image_start_token_id", "boi_token_index"), 97),
    **dict.fromkeys(("vision_end_token_id", "eoi_token_id", "image_end_token_id", "eoi_token_index"), 98),
}
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_MIXED_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
_EVERY_HEAD = {"num_key_value_heads": 4}
# What some model types need besides.
_SETTINGS_OF_TYPE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "esmc", "glm4_moe_lite"),
            *("glm_moe_dsa", "hy_v4", "minicpm3", "mistral4", "mistral_large4", "youtu"),
        ),
        _EVERY_HEAD,
    ),
    **dict.fromkeys(
        ("granitemoehybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
        _MIXED_LAYERS,
    ),
    **dict.fromkeys(("lfm2_moe", "lfm3"), _CONVOLUTIONS),
    **dict.fromkeys(("paddleocr_vl_text", "qwen2_5_vl_text", "qwen2_vl_text"), _THREE_AXES),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), {"num_kv_shared_layers": 0, "global_head_dim": 8}),
    "bailing_hybrid": _EVERY_HEAD | {"layer_group_size": 2},
    **dict.fromkeys(
        (*("glm4v_text", "glm4v_moe_text", "glm46v_text", "glm_ocr_text", "hunyuan_vl_text", "cosmos3_edge_text"),),
        {"rope_parameters": _THREE_AXES["rope_parameters"] | {"partial_rotary_factor": 1.0}},
    ),
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "llama4_vision_model": {"vision_output_dim": 32, "intermediate_size": 128},
    "longcat_flash": _EVERY_HEAD | {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {"intermediate_layers_indices": [0], "vision_output_dim": 64, "num_global_layers": 1},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_ctx": 64},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n": {"vision_soft_tokens_per_image": 4},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hrm_text": {"L_bp_cycles": [3, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _EVERY_HEAD | _MIXED_LAYERS,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


class NotTiny(ValueError):
    """The settings known here do not make the model small."""


def model_types(kind: str) -> list[str]:
    """Return the model types that Transformers has a class for."""
    return list(_classes(kind))


def tiny_model(kind: str, model_type: str) -> PreTrainedModel:
    """Make a model in eval mode, the same one in every process.

    Raises:
        NotTiny: it would have more than ``LARGEST`` parameters.
        Exception: its config class does not take the settings, whatever it raises.
    """
    register_image_tower()
    config = _tiny_config(CONFIG_MAPPING[model_type], _SETTINGS_OF_TYPE.get(model_type, {}))
    name = _classes(kind)[model_type]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    if isinstance(text_config := getattr(config, "text_config", None), model_class.config_class):
        config = text_config  # as AutoModelForCausalLM does
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise NotTiny(f"{size} parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    _open_gates(model)
    return model


def _open_gates(model: PreTrainedModel) -> None:
    """Let images reach the text where a projection or a gate that begins at zero keeps them out."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("gate" in name or "projection" in name) and not parameter.any() and not name.endswith("bias"):
                parameter.normal_(generator=generator)


def _classes(kind: str) -> Mapping[str, str | Sequence[str]]:
    classes = getattr(modeling_auto, KINDS[kind])
    if kind != "audio-text-to-text":
        return classes
    images = _classes("image-text-to-text")
    return {model_type: name for model_type, name in classes.items() if model_type not in images}


def _tiny_config(config_class: type[PreTrainedConfig], own: Mapping[str, Any]) -> PreTrainedConfig:
    names = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    aliases = getattr(config_class, "attribute_map", {})
    settings = {name: value for name, value in _SETTINGS.items() if name in names and name not in aliases}
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if part is transformers.AutoConfig:
            part = type(getattr(config_class(), name, None))
        if isinstance(part, type) and issubclass(part, PreTrainedConfig):
            settings[name] = _tiny_config(part, _SETTINGS_OF_TYPE.get(part.model_type, {})).to_dict()
    return config_class(**settings | dict(own))
