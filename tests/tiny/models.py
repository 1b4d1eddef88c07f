"""Tiny models and batches for tests: `from tiny.models import SPECS, packed_batches`."""

from dataclasses import replace

import torch

from prism_mcore.batch import PackedBatch
from prism_mcore.model.spec import ModelSpec, spec_from_config

# Odd values on purpose: head_dim is not hidden/heads, the vocabulary does not divide by 2.
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "tie_word_embeddings": False,
    "vocab_size": 61,
}
HYBRID = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "chunk_size": 8,
    "conv_kernel": 4,
    "head_dim": 16,
    "hidden_size": 48,
    "hybrid_override_pattern": "M-M*-M",
    "initializer_range": 0.2,
    "intermediate_size": 80,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 16,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 4,
    "max_position_embeddings": 64,
    "mlp_hidden_act": "relu2",
    "n_groups": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "ssm_state_size": 16,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, float("inf")],
    "use_conv_bias": True,
    "vocab_size": 61,
}
# One SSM group, tied embeddings, every multiplier away from 1: Granite-4-H.
GRANITE_HYBRID = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.2,
    "layer_types": ["mamba", "attention", "mamba"],
    "logits_scaling": 2.0,
    "mamba_chunk_size": 8,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_proj_bias": False,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_experts_per_tok": 0,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 0,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.5,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "shared_intermediate_size": 80,
    "tie_word_embeddings": True,
    "vocab_size": 61,
}
CONFIGS = {"dense": DENSE, "hybrid": HYBRID, "granite hybrid": GRANITE_HYBRID}
SPECS: dict[str, ModelSpec] = {name: spec_from_config(config, name) for name, config in CONFIGS.items()}
# What sets the two Qwens apart, at once.
SPECS["qwen"] = replace(SPECS["dense"], qkv_bias=True, qk_norm=True)

# Parameters of the published models.
PUBLISHED = {
    "granite-4.0-micro": 3_402_836_480,
    "granite-4.0-h-micro": 3_191_396_096,
    "granite-3.3-8b": 8_170_864_640,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-small-24b-2501": 23_572_403_200,
    "nemotron-h-8b": 8_100_852_736,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}


def packed_batches(spec: ModelSpec, count: int, *, b: int = 2, s: int = 16, seed: int = 0) -> list[PackedBatch]:
    """`count` micro-batches of random tokens, each row cut into two documents at a random place; sources alternate."""
    generator = torch.Generator().manual_seed(seed)
    return [packed_batch(random_documents(spec, b, s, generator), s, i) for i in range(count)]


def random_documents(spec: ModelSpec, b: int, s: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Documents that fill b rows of s tokens, two to a row."""
    documents = []
    for _ in range(b):
        cut = int(torch.randint(1, s, (), generator=generator))
        documents += torch.randint(spec.vocab_size, (s,), generator=generator).split([cut, s - cut])
    return documents


def packed_batch(documents: list[torch.Tensor], s: int, number: int = 0) -> PackedBatch:
    """Isolated documents, which must fill rows of s tokens, as one micro-batch."""
    lengths = torch.tensor([len(d) for d in documents])
    tokens = torch.cat(documents)
    b = len(tokens) // s
    ends = lengths.cumsum(0)
    loss_mask = torch.ones(len(tokens), dtype=torch.bool)
    loss_mask[ends - 1] = False
    cu_seqlens = torch.full((len(tokens) + 1,), len(tokens), dtype=torch.int32)
    cu_seqlens[0], cu_seqlens[1 : len(ends) + 1] = 0, ends
    return PackedBatch(
        tokens=tokens.view(b, s),
        labels=tokens.roll(-1).view(b, s),
        loss_mask=loss_mask.view(b, s),
        position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()]).view(b, s),
        seq_idx=torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths).view(b, s),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()),
        num_tokens=int(loss_mask.sum()),
        source_ids=torch.full((b,), number % 2, dtype=torch.int32),
        sample_ids=torch.arange(number * b, (number + 1) * b),
    )
