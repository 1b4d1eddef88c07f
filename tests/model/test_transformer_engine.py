"""The model on Transformer Engine's layers, in a stub of them: same loss, same gradients, same parameter names.

In a process of its own, because megatron-core looks for Transformer Engine once. What is called there, by us and by
megatron-core, must be in the signatures of the versions that are accepted, and of one that is installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny.models import SPECS
from tiny.signatures import ACCEPTED, installed_engine, parameters_of

TESTS = Path(__file__).parents[1]
NAMES = ("dense", "hybrid", "granite hybrid", "qwen", "window")
BACKENDS = {
    "here": {},
    "te": dict.fromkeys(("linear", "rms_norm", "attention"), "te"),
    "tensorwise": {"fp8_linear": "te"},
    "blockwise": {"fp8_linear": "te"},
    "recomputed": {"fp8_linear": "te"},
}


def compare() -> dict:
    """By model and backend: the largest relative difference of a gradient, and products in FP8 of each pass."""
    from tiny import transformer_engine_stub as stub

    stub.install()
    import torch
    from tiny.models import DENSE, packed_batches

    from prism_kernels.backends import SelectedBackend
    from prism_mcore import platform
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.fp8 import Fp8
    from prism_mcore.model.ops import Ops
    from prism_mcore.model.spec import spec_from_config
    from prism_mcore.parallel import ParallelSettings, init_groups

    device = platform.start(threads=1)
    groups = init_groups(ParallelSettings())
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5}
    found: dict = {name: {} for name in NAMES}
    for name, spec in (SPECS | {"window": spec_from_config(DENSE | mistral)}).items():
        gradients = {}
        for backend, ops_of in BACKENDS.items():
            ops = Ops({}, device)
            ops.backends |= {op: SelectedBackend(of, "a stub", False) for op, of in ops_of.items()}
            recipe = {"tensorwise": "tensorwise", "blockwise": "blockwise", "recomputed": "blockwise"}.get(backend)
            layers, recompute = [list(range(len(spec.pattern)))], frozenset("M*-" if backend == "recomputed" else "")
            fp8 = Fp8(recipe, ops, groups.tp, bf16_ends=1) if recipe else None
            dtype = torch.float32
            (model,) = build_chunks(spec, layers, groups, ops, dtype=dtype, device=device, recompute=recompute, fp8=fp8)
            model.initialise(3)
            stub.PRODUCTS.clear()
            model(packed_batches(spec, 1, s=11)[0])[0].backward()
            gradients[backend] = {parameter: tensor.grad for parameter, tensor, _ in model.table()}
            in_force = [product for product in stub.PRODUCTS if product is not None]
            with model.without_fp8(), torch.no_grad():
                stub.PRODUCTS.clear()
                model(packed_batches(spec, 1)[0])
            assert not any(stub.PRODUCTS)
            want, got = gradients["here"], gradients[backend]
            assert want.keys() == got.keys()
            largest = max(float((got[n] - want[n]).abs().max() / want[n].abs().max()) for n in want)
            scales = {one.fp8_format + (", powers of two" if powers_of_two(one) else "") for one in in_force}
            found[name][backend] = {"largest": largest, "in FP8": len(in_force), "recipe": sorted(scales)}
    platform.shutdown()
    return {"models": found, "calls": {name: sorted(arguments) for name, arguments in stub.CALLS.items()}}


def powers_of_two(recipe) -> bool:
    tensors = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
    return all(getattr(recipe, tensor).power_2_scale for tensor in tensors)


@pytest.fixture(scope="module")
def found():
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_transformer_engines_layers_take_what_they_are_given(found):
    for name in NAMES:
        assert {kind: case["largest"] for kind, case in found["models"][name].items()} == {
            kind: pytest.approx(0, abs=1e-5) for kind in BACKENDS
        }, name


def test_fp8_is_in_force_around_every_large_linear_but_at_the_ends(found):
    """Two products a sub-layer, Mamba's in_proj being one; in recomputation, too."""
    for name in NAMES:
        inner = len(SPECS.get(name, SPECS["dense"]).pattern) - 2
        assert {kind: case["in FP8"] for kind, case in found["models"][name].items()} == {
            "here": 0,
            "te": 0,
            "tensorwise": 2 * inner,
            "blockwise": 2 * inner,
            "recomputed": 4 * inner,
        }, name


def test_scales_are_powers_of_two_and_gradients_e5m2_where_one_scale_spans_a_tensor(found):
    for case in found["models"].values():
        assert case["tensorwise"]["recipe"] == ["e4m3, gradients e5m2, powers of two"]
        assert case["blockwise"]["recipe"] == case["recomputed"]["recipe"] == ["e4m3, powers of two"]


@pytest.mark.parametrize("version", ACCEPTED)
def test_what_is_called_is_in_the_signatures_of_accepted_versions(found, version):
    for name, arguments in found["calls"].items():
        assert set(arguments) <= set(ACCEPTED[version][name]), name


def test_what_is_called_is_in_the_signatures_of_the_installed_version(found):
    if (folder := installed_engine()) is None:
        pytest.skip("transformer-engine is not installed")
    for name, arguments in found["calls"].items():
        assert set(arguments) <= parameters_of(folder, name), name


if __name__ == "__main__":
    print(json.dumps(compare()))
