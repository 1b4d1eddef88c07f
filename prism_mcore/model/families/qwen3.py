"""Qwen3: Llama with an RMSNorm on each head of queries and keys."""

from prism_mcore.model.families import DECODER_TENSORS, decoder, qwen_window
from prism_mcore.model.spec import ATTENTION, Family, Keys, ModelSpec

NORMS = {f"self_attn.{which}_norm.weight": [f"mixer.{which}_norm.weight"] for which in "qk"}


def read(keys: Keys) -> ModelSpec:
    if keys.value("head_dim", default=None) is None:  # transformers takes an absent key to mean 128
        keys.fail("head_dim", "the size of a head")
    return decoder(keys, "qwen3", sliding_window=qwen_window(keys), qk_norm=True)


FAMILY = Family("Qwen3ForCausalLM", read, {**DECODER_TENSORS, ATTENTION: {**DECODER_TENSORS[ATTENTION], **NORMS}})
