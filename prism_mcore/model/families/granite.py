"""Granite 3: Llama with multipliers."""

from prism_mcore.model.families import DECODER_TENSORS, decoder, granite_multipliers
from prism_mcore.model.spec import Family, Keys, ModelSpec


def read(keys: Keys) -> ModelSpec:
    return decoder(keys, "granite", **granite_multipliers(keys))


FAMILY = Family("GraniteForCausalLM", read, DECODER_TENSORS)
