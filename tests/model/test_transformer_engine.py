"""The model on Transformer Engine's layers, in a stub of them: same loss, same gradients, same parameter names.

In a process of its own, because megatron-core looks for Transformer Engine once.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def compare() -> dict[str, float]:
    """The largest relative difference of a gradient, for every model; prints it as JSON."""
    sys.path[:0] = [str(TESTS)]
    from tiny import transformer_engine_stub

    transformer_engine_stub.install()
    import torch
    from tiny.models import DENSE, SPECS, packed_batches

    from prism_kernels.backends import SelectedBackend
    from prism_mcore import platform
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.model.spec import spec_from_config
    from prism_mcore.parallel import ParallelSettings, init_groups

    device = platform.start(threads=1)
    groups = init_groups(ParallelSettings())
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5}
    largest = {}
    for name, spec in (SPECS | {"window": spec_from_config(DENSE | mistral)}).items():
        gradients = []
        for backend in ("here", "te"):
            ops = Ops({}, device)
            if backend == "te":
                ops.backends |= {
                    op: SelectedBackend("te", "a stub", False) for op in ("linear", "rms_norm", "attention")
                }
            layers = [list(range(len(spec.pattern)))]
            (model,) = build_chunks(spec, layers, groups, ops, dtype=torch.float32, device=device)
            model.initialise(3)
            model(packed_batches(spec, 1)[0])[0].backward()
            gradients.append({parameter: tensor.grad for parameter, tensor, _ in model.table()})
        want, got = gradients
        assert want.keys() == got.keys()
        largest[name] = max(float((got[n] - want[n]).abs().max() / want[n].abs().max()) for n in want)
    platform.shutdown()
    return largest


def test_transformer_engines_layers_take_what_they_are_given():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    largest = json.loads(done.stdout.splitlines()[-1])
    assert largest == {
        name: pytest.approx(0, abs=1e-5) for name in ("dense", "hybrid", "granite hybrid", "qwen", "window")
    }


if __name__ == "__main__":
    print(json.dumps(compare()))
