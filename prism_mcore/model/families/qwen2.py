"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values."""

from prism_mcore.model.families import DECODER_TENSORS, decoder, qwen_window
from prism_mcore.model.spec import ATTENTION, Family, Keys, ModelSpec

BIASES = {f"self_attn.{which}_proj.bias": [f"mixer.qkv.bias[{which}]"] for which in "qkv"}


def read(keys: Keys) -> ModelSpec:
    return decoder(keys, "qwen2", sliding_window=qwen_window(keys), qkv_bias=True)


FAMILY = Family("Qwen2ForCausalLM", read, {**DECODER_TENSORS, ATTENTION: {**DECODER_TENSORS[ATTENTION], **BIASES}})
