"""Llama: attention with RoPE and SwiGLU in turn."""

from prism_mcore.model.families import DECODER_TENSORS, decoder
from prism_mcore.model.spec import Family, Keys, ModelSpec


def read(keys: Keys) -> ModelSpec:
    return decoder(keys, "llama")


FAMILY = Family("LlamaForCausalLM", read, DECODER_TENSORS)
