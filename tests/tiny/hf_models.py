"""Tiny random Hugging Face directories of every family: `from tiny.hf_models import FAMILIES, save_hf`.

Odd values on purpose: head_dim is not hidden/heads, the vocabulary of 61 does not divide by 2, one SSM group and
several, every Granite multiplier away from 1, a sliding window and a llama3 RoPE that bite within SEQ_LEN tokens, tied
and untied output weights.
"""

import json
from pathlib import Path

import torch
import transformers
from tiny import oracle

SEQ_LEN = 40  # tokens; longer than the window, llama3's original positions and several chunks of the scan
BASE = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 61,
    "tie_word_embeddings": False,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GRANITE = BASE | {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "tie_word_embeddings": True,
}
GRANITE_4 = GRANITE | {
    "model_type": "granitemoehybrid",
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "shared_intermediate_size": 80,
    "mamba_chunk_size": 8,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_proj_bias": False,
}
NEMOTRON = {
    "model_type": "nemotron_h",
    "chunk_size": 8,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "layer_types": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp", "linear_attention"],
    "mamba_head_dim": 16,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 4,
    "mlp_hidden_act": "relu2",
    "n_groups": 2,
    "ssm_state_size": 16,
    "time_step_limit": [0.0, float("inf")],
    "use_conv_bias": True,
}
# What transformers builds each of them from.
FAMILIES: dict[str, dict] = {
    "llama-3.1": BASE | {"model_type": "llama", "rope_parameters": LLAMA3},
    "mistral-v0.1": BASE | {"model_type": "mistral", "sliding_window": 7} | ROPE,
    "mistral-small": BASE | {"model_type": "mistral", "sliding_window": None, "head_dim": 24} | ROPE,
    "granite-3.3": GRANITE | {"model_type": "granite"} | ROPE,
    "granite-4.0-micro": GRANITE_4 | ROPE | {"layer_types": ["full_attention"] * 2, "position_embedding_type": "rope"},
    "granite-4.0-h-micro": GRANITE_4
    | ROPE
    | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "position_embedding_type": "nope",
    },
    "nemotron-h": {key: value for key, value in BASE.items() if key not in ("rms_norm_eps", "num_hidden_layers")}
    | NEMOTRON,
    "qwen2.5": BASE | {"model_type": "qwen2", "tie_word_embeddings": True} | ROPE,
    "qwen3": BASE
    | {"model_type": "qwen3", "head_dim": 24, "use_sliding_window": True, "sliding_window": 7}
    | {"max_window_layers": 0}
    | ROPE,
}
OLDER_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}
NEWER_KEYS = {"n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers"}
NEMOTRON_LAYERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}


def save_hf(
    family: str,
    folder: Path,
    *,
    older_keys: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **changes,
) -> transformers.PreTrainedModel:
    """Write a random model of a family as transformers saves it, or with the key style of files before 5.0.

    changes: keys of its config.json. Returns the model, whose Mamba layers clamp time steps at nothing.
    """
    model = oracle.hf_model(FAMILIES[family] | changes, seed).to(dtype)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if older_keys:
        file = folder / "config.json"
        file.write_text(json.dumps(older(json.loads(file.read_text())), indent=2) + "\n")
    return model


def older(raw: dict) -> dict:
    """A config.json of transformers 5 in the keys that the models' own files have."""
    raw = dict(raw, transformers_version="4.48.0", torch_dtype=raw["dtype"])
    del raw["dtype"]
    rope = raw.pop("rope_parameters", None)
    if rope is not None:
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if raw["model_type"] == "nemotron_h":
        return _older_nemotron(raw)
    if raw["model_type"].startswith("qwen"):
        raw.pop("layer_types")  # follow from max_window_layers
    if "layer_types" in raw:
        raw["layer_types"] = [OLDER_LAYERS[kind] for kind in raw["layer_types"]]
    raw.pop("time_step_limit", None)  # no Granite 4 file has it
    return raw


def _older_nemotron(raw: dict) -> dict:
    kinds = raw.pop("layers_block_type", None) or raw.pop("layer_types")
    for key in [key for key in raw if key in NEWER_KEYS or "expert" in key or "moe" in key or key.startswith("mtp_")]:
        del raw[key]
    return raw | {
        "hybrid_override_pattern": "".join(NEMOTRON_LAYERS[kind] for kind in kinds),
        "num_hidden_layers": len(kinds),
        "attention_head_dim": raw.pop("head_dim"),
        "time_step_limit": [0.0, float("inf")],
    }
