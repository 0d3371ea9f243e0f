"""Small random models of Transformers, of the families that people prefix-tune, and inputs for them."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

VOCABULARY, POSITIONS, WINDOW = 99, 64, 4
PAD, END = 0, 2
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END}
# With a head of its own a random model does not repeat its last token; large weights let an error show.
OTHERS = {"max_position_embeddings": POSITIONS, "initializer_range": 0.3, "tie_word_embeddings": False}
# Two passes must give the same gradients.
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"), 0.0)
NO_DROPOUT |= dict.fromkeys(("dropout", "dropout_rate", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
WINDOWS = GROUPED | {"sliding_window": WINDOW, "use_sliding_window": True}
WINDOWS |= {"layer_types": ["sliding_attention", "full_attention"]}
SEQ2SEQ = {"decoder_start_token_id": 97, "forced_eos_token_id": None, "d_model": 32}
BART = SEQ2SEQ | {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.2}
T5 = SEQ2SEQ | {"d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
UNEVEN_FLAN_T5 = T5 | {"num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"}
SPEECH = {"max_source_positions": 8, "max_target_positions": 32, "num_mel_bins": 6}
SPEECH |= {"begin_suppress_tokens": None, "suppress_tokens": None}
IMAGE = {"image_size": 16, "patch_size": 8}
TOWERS = {"vision_config": SIZES | IMAGE, "text_config": SIZES | TOKENS}


EXPERTS = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
LATENT |= {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16}
# One layer attends to 2 key heads of 8, the other to 2 of 16; or to 1 of 16, whose values are its keys.
UNEVEN_KEYS = WINDOWS | {"sliding_window": POSITIONS, "global_head_dim": 16, "num_kv_shared_layers": 0}
UNEVEN_KEYS |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
FEWER_KEYS = UNEVEN_KEYS | {"num_global_key_value_heads": 1, "attention_k_eq_v": True}
# A head dim that is not the hidden size divided by the number of heads.
WIDE_KEYS = GROUPED | {"head_dim": 16}
IMAGE_TOKEN, BEFORE_IMAGE = 98, 97
READER = SIZES | TOKENS | OTHERS | NO_DROPOUT | GROUPED
THREE_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN2_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}


# Transformers' name of each model's config, and the settings that it needs beside the sizes.
ENCODERS = {
    "BERT": ("bert", {}),
    "RoBERTa": ("roberta", {}),
    "ELECTRA": ("electra", {}),
    "DistilBERT": ("distilbert", {}),
    "ALBERT": ("albert", {}),
    "ModernBERT": ("modernbert", {"cls_token_id": 1, "sep_token_id": END}),
}
DECODERS = {
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Llama": ("llama", GROUPED),
    "Mistral": ("mistral", GROUPED | {"sliding_window": WINDOW}),
    "Qwen2": ("qwen2", WINDOWS),
    "Qwen3": ("qwen3", WINDOWS),
    "Gemma 2": ("gemma2", WINDOWS),
    "Gemma 3": ("gemma3_text", WINDOWS),
    "Phi": ("phi", {"num_key_value_heads": 2}),
    "Phi-3": ("phi3", {"num_key_value_heads": 2}),
}
ENCODER_DECODERS = {
    "T5": ("t5", T5),
    "flan-T5 of uneven depths": ("t5", UNEVEN_FLAN_T5),
    "BART": ("bart", BART),
    "mBART": ("mbart", BART),
    "Whisper": ("whisper", BART | SPEECH),
}
IMAGES = {
    "ViT": ("vit", IMAGE),
    "DeiT": ("deit", IMAGE | {"architectures": ["DeiTForImageClassification"]}),
    "CLIP": ("clip", TOWERS),
}
UNUSUAL_DECODERS = {
    "Gemma 4": ("gemma4_text", UNEVEN_KEYS),
    "Gemma 4 of fewer global heads": ("gemma4_text", FEWER_KEYS),
    "wide Qwen3": ("qwen3", WIDE_KEYS),
    "wide Gemma 3": ("gemma3_text", WIDE_KEYS),
    "Mixtral": ("mixtral", EXPERTS | {"num_local_experts": 4}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | {"num_experts": 4}),
    "DeepSeek-V3": ("deepseek_v3", EXPERTS | LATENT | {"num_key_value_heads": 4}),
    "Qwen3-Next": ("qwen3_next", EXPERTS | DELTA | HYBRID | {"num_experts": 4}),
    "LFM2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}),
}
IMAGES_BESIDE_TEXT = {
    "LLaVA": (
        "llava",
        {
            "text_config": READER | {"model_type": "llama"},
            "vision_config": SIZES | IMAGE | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layer": -1,
        },
    ),
    "Qwen2-VL": (
        "qwen2_vl",
        {
            # The second name is that of Transformers 4.
            "text_config": READER | {"rope_parameters": THREE_AXES, "rope_scaling": {"type": "mrope"} | THREE_AXES},
            "vision_config": QWEN2_VISION,
            "image_token_id": IMAGE_TOKEN,
            "vision_start_token_id": BEFORE_IMAGE,
        },
    ),
}
FAMILIES = ENCODERS | DECODERS | ENCODER_DECODERS | IMAGES | UNUSUAL_DECODERS | IMAGES_BESIDE_TEXT


def make_base(name: str, auto_class: type | None = None, **settings: object) -> PreTrainedModel:
    """A random model in eval mode, with the head that is usual for it, or with that of ``auto_class``."""
    model_type, own = FAMILIES[name]
    sizes = {} if name in IMAGES_BESIDE_TEXT else SIZES | TOKENS | NO_DROPOUT
    config = AutoConfig.for_model(model_type, **(sizes | OTHERS | own | settings))
    return (auto_class or _usual_class(name)).from_config(config).eval()


def _usual_class(name: str) -> type:
    if name in ENCODERS:
        return transformers.AutoModelForSequenceClassification
    if name in IMAGES_BESIDE_TEXT:
        return transformers.AutoModelForImageTextToText
    if name in DECODERS | UNUSUAL_DECODERS:
        return transformers.AutoModelForCausalLM
    if name in ENCODER_DECODERS:
        return transformers.AutoModelForSpeechSeq2Seq if name == "Whisper" else transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModel if name == "CLIP" else transformers.AutoModelForImageClassification


def make_inputs(name: str, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Tokens ``[rows, length]`` without padding, images, sounds: whatever the model ``name`` takes."""
    tokens = torch.randint(3, 97, (rows, length))
    images = {"pixel_values": torch.randn(rows, 3, 16, 16)}
    if name == "CLIP":
        return images | {"input_ids": tokens}
    if name in IMAGES:
        return images
    if name == "Whisper":
        return {"input_features": torch.randn(rows, 6, 16), "decoder_input_ids": tokens}
    if name == "LLaVA":
        tokens[:, 1:5] = IMAGE_TOKEN  # one for each patch
        return images | {"input_ids": tokens}
    if name == "Qwen2-VL":
        tokens[:, 1], tokens[:, 2] = BEFORE_IMAGE, IMAGE_TOKEN  # one for four patches, each of two frames
        patches = {"pixel_values": torch.randn(4 * rows, 3 * 2 * 8 * 8)}
        patches["image_grid_thw"] = torch.tensor([[1, 2, 2]] * rows)
        if transformers.__version__ >= "5":
            patches["mm_token_type_ids"] = (tokens == IMAGE_TOKEN).long()
        return patches | {"input_ids": tokens}
    if name in ENCODER_DECODERS:
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
    return {"input_ids": tokens}
