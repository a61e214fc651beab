"""Tiny configurations of the architectures that people fine-tune, by task and model type."""

from __future__ import annotations

from typing import Any

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTHS = {**LAYERS, "intermediate_size": 24}
ENCODER = {**WIDTHS, **ENDS, "vocab_size": 40, "max_position_embeddings": 32}
DECODER = {**ENCODER, "num_key_value_heads": 2}
HEADS = {**DECODER, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40, **ENDS}
DISTIL = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 40}
BART = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"vocab_size": 40, "max_position_embeddings": 32, **ENDS, "decoder_start_token_id": 2},
}
OPT = {**LAYERS, **ENDS, "ffn_dim": 24, "vocab_size": 40, "max_position_embeddings": 32}
OPT |= {"word_embed_proj_dim": 16}
FALCON = {**LAYERS, **ENDS, "vocab_size": 40}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ROTARY = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
ROTARY |= {"rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
NEO |= {"attention_types": [[["global", "local"], 1]], "vocab_size": 40, **ENDS}
NEO |= {"max_position_embeddings": 32}

TEXT: dict[str, dict[str, Any]] = {
    "albert": {**ENCODER, "embedding_size": 8},
    "bart": BART,
    "bert": ENCODER,
    "big_bird": {**ENCODER, "attention_type": "original_full"},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, **ENDS},
    "camembert": ENCODER,
    "convbert": {**ENCODER, "embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 1},
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA,
    "distilbert": {**DISTIL, "max_position_embeddings": 32, "pad_token_id": 0},
    "electra": {**ENCODER, "embedding_size": 16},
    "ernie": ENCODER,
    "falcon": FALCON,
    "gemma": HEADS,
    "gpt2": GPT2,
    "gpt_neo": NEO,
    "layoutlm": ENCODER,
    "llama": HEADS,
    "mistral": DECODER,
    "mobilebert": {
        **{**WIDTHS, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0},
        **{"embedding_size": 16, "intra_bottleneck_size": 16},
    },
    "modernbert": ENCODER,
    "mpnet": ENCODER,
    "opt": OPT,
    "phi": ENCODER,
    "qwen2": DECODER,
    "qwen3": HEADS,
    "roberta": ENCODER,
    "roformer": {**ENCODER, "embedding_size": 16},
    "squeezebert": {
        **{**ENCODER, "embedding_size": 16},
        **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate")},
        "output_groups": 1,
    },
    "xlm-roberta": ENCODER,
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 40, **ENDS},
}
CAUSAL: dict[str, dict[str, Any]] = {
    "biogpt": ENCODER,
    "bloom": TEXT["bloom"],
    "codegen": {**ROTARY, "n_embd": 32, "n_head": 4},
    "cohere": DECODER,
    "falcon": FALCON,
    "gemma": HEADS,
    "gemma2": HEADS,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": NEO,
    "gpt_neox": ENCODER,
    "gptj": ROTARY,
    "granite": DECODER,
    "llama": HEADS,
    "mistral": DECODER,
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 40, "max_seq_len": 32},
    "olmo2": DECODER,
    "opt": OPT,
    "phi": ENCODER,
    "phi3": DECODER,
    "qwen2": DECODER,
    "qwen3": HEADS,
    "smollm3": DECODER,
    "stablelm": DECODER,
    "starcoder2": DECODER,
    "xglm": {
        **{"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24},
        **{"vocab_size": 40, "max_position_embeddings": 32, **ENDS},
    },
}
VISION = {**WIDTHS, "image_size": 16, "patch_size": 8, "num_channels": 3}
DINO = {**LAYERS, "mlp_ratio": 2, "image_size": 16, "patch_size": 8, "num_channels": 3}
STAGES = {"image_size": 32, "patch_size": 4, "num_channels": 3, "embed_dim": 8}
STAGES |= {"depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
CLIP = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP_TEXT = {**CLIP, "intermediate_size": 24, "vocab_size": 40, **ENDS}
IMAGE: dict[str, dict[str, Any]] = {
    "beit": VISION,
    "clip": {"vision_config": VISION, "text_config": CLIP_TEXT, "projection_dim": 8},
    "convnext": {"image_size": 32, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "convnextv2": {"image_size": 32, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "data2vec-vision": VISION,
    "deit": {**VISION, "architectures": ["DeiTForImageClassification"]},
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "donut-swin": STAGES,
    "focalnet": {
        **{"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1]},
        **{"hidden_sizes": [8, 16], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    },
    "ijepa": VISION,
    "levit": {
        **{"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2]},
        **{"depths": [1, 1, 1], "mlp_ratio": [2, 2, 2]},
        **{"attention_ratio": [2, 2, 2], "patch_size": 16, "key_dim": [8, 8, 8]},
        "architectures": ["LevitForImageClassification"],
    },
    "mobilevit": {
        **{"image_size": 64, "hidden_sizes": [8, 12, 16], "num_attention_heads": 2},
        "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
    },
    "pvt": {
        **{"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2},
        **{"sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2]},
        **{"num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    },
    "segformer": {
        "image_size": 32,
        **{"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2},
        **{"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
        **{"num_attention_heads": [1, 2], "decoder_hidden_size": 8},
    },
    "siglip": {"vision_config": VISION, "text_config": CLIP_TEXT},
    "swin": STAGES,
    "swinv2": STAGES,
    "vit": VISION,
    "vit_msn": VISION,
}
TABLE = {"text-classification": TEXT, "causal-lm": CAUSAL, "image-classification": IMAGE}
