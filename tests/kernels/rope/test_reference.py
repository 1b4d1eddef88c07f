"""Rotary embedding and its frequencies against transformers."""

import pytest
import torch
from tiny.accuracy import randn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from prism_kernels.rope import reference
from prism_kernels.rope.angles import rope_frequencies, rope_table

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "attention_factor": 1.2,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["plain", "llama3", "yarn"])
def test_rope_equals_transformers(scaling):
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=scaling or {"rope_type": "default", "rope_theta": 500000.0},
    )
    frequencies = rope_frequencies(128, 500000.0, scaling)
    if scaling:
        assert torch.equal(frequencies, ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")[0])
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1], [100, 4095, 8192, 99999, 5, 6]])
    q, k = randn(12, 4, 128).float(), randn(12, 2, 128).float()
    cos, sin = LlamaRotaryEmbedding(config)(q, position_ids)
    rows = (x.unflatten(0, (2, 6)).transpose(1, 2) for x in (q, k))
    exact = [x.transpose(1, 2).flatten(0, 1) for x in apply_rotary_pos_emb(*rows, cos, sin)]
    ours = reference.rope(q, k, *rope_table(position_ids, 128, 500000.0, scaling))
    torch.testing.assert_close(ours, tuple(exact), rtol=1e-6, atol=1e-6)


def test_rope_gradient_rotates_back():
    table = rope_table(torch.arange(5), 6, 100.0)
    q, k = randn(5, 4, 6).requires_grad_(), randn(5, 2, 6).requires_grad_()
    rotated = reference.rope(q, k, *table)
    grads = torch.autograd.grad(rotated, (q, k), [x.detach() for x in rotated])
    torch.testing.assert_close(grads, (q, k), rtol=1e-6, atol=1e-6)  # fp32 tables


class CopiesFromTheCPU(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu" and out.device.type != "cpu":
            self.names.append(func.overloadpacket.__name__)
        return out


def test_rope_copies_nothing_to_the_device_but_once():
    """A CUDA graph is captured on the second call."""
    positions = torch.arange(6, device="meta")
    for expected in (1, 0):
        with CopiesFromTheCPU() as copies, torch.inference_mode():
            rope_table(positions, 16, 1234.0, LLAMA3)
        assert len(copies.names) == expected
    assert not rope_table(positions, 16, 1234.0, LLAMA3)[0].is_inference()


def test_unknown_rope_scaling_is_refused():
    with pytest.raises(ValueError, match="'dynamic' is not supported"):
        rope_frequencies(64, 10000.0, {"rope_type": "dynamic"})
