"""Mistral: Llama with a sliding window, where the file names one."""

from prism_mcore.model.families import DECODER_TENSORS, decoder
from prism_mcore.model.spec import Family, Keys, ModelSpec


def read(keys: Keys) -> ModelSpec:
    if "sliding_window" not in keys.raw:  # null means no window; transformers takes an absent key to mean 4096
        keys.fail("sliding_window", "a window in tokens, or null for none")
    window = None if keys.value("sliding_window", default=None) is None else keys.integer("sliding_window")
    return decoder(keys, "mistral", sliding_window=window)


FAMILY = Family("MistralForCausalLM", read, DECODER_TENSORS)
