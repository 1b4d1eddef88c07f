"""The model in FP8 on Transformer Engine's real linears against our own products, on a CPU: the same bits.

Runs where `tools/te_oracle.sh` has built Transformer Engine. Its linears get its own reference quantisers; ours are the
`reference` backend, or torch's product. TE_RESULTS names a folder for a record, a file a layout; TE_SOURCE a copy of
Transformer Engine's repository, whose tests have reference quantisers of blocks.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from prism_kernels.backends import missing_module

if missing := missing_module("te"):
    pytest.skip(f"no {missing}: tools/te_oracle.sh builds it", allow_module_level=True)

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 600
LAYOUTS = {"alone": 1, "tp2": 2, "tp2+sp": 2}
NAMES = ("dense", "hybrid", "granite hybrid")
SOURCE = os.environ.get("TE_SOURCE", "")
RECIPES = ("tensorwise", "blockwise") if SOURCE else ("tensorwise",)
# (our product, dtype, recomputed kinds). `torch` is the product that Transformer Engine's reference quantisers call;
# `reference` adds in the same order in fp32, but not in bf16, nor where a sum is of several blocks. Scales here are of
# a rank's own shard, as Transformer Engine's; where it says "whole", of the tensor, as ours are: those agree in every
# layout, and the two differ where a number is subnormal under one of them.
CASES = {
    "tensorwise": [
        ("reference", "fp32", ""),
        ("reference", "fp32", "M*-"),
        ("torch", "fp32", ""),
        ("torch", "bf16", "M*-"),
        ("reference", "bf16", ""),
        ("whole reference", "fp32", ""),
    ],
    "blockwise": [("reference", "fp32", ""), ("reference", "fp32", "M*-"), ("reference", "bf16", "")],
}


def closeness(case: str) -> float:
    """How far a tensor may be apart, as a share of its largest number; one step of bf16 is up to 2^-8 of a number."""
    if "bf16 by reference" in case:
        return 2**-7
    return 1e-4 if "by whole" in case else 1e-6 if case.startswith("blockwise, ") else 0.0


def processes(layout: str) -> dict:
    """What the ranks of a layout found, by case; each case has the names that were equal and those that were not."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folders = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels"), *filter(None, [SOURCE])]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(LAYOUTS[layout]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",  # the reference product of blocks has a kernel
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONWARNINGS": "ignore",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, layout],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(LAYOUTS[layout])
    ]
    try:
        answers = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(errors[-3000:] for _, errors in answers)
    return json.loads(answers[0][0].splitlines()[-1])


# --- a rank -----------------------------------------------------------------------------------------------------------


def found_by_a_rank(layout: str) -> dict:
    from tiny import engine_on_cpu

    engine_on_cpu.prepare()
    import torch.distributed as dist

    from prism_mcore import platform
    from prism_mcore.model import transformer_engine
    from prism_mcore.parallel import ParallelSettings, init_groups

    platform.start(threads=1)
    groups = init_groups(ParallelSettings(tp=LAYOUTS[layout], sequence_parallel=layout.endswith("sp")))
    found = {"powers of two": quantisers_scale_by_powers_of_two(transformer_engine, engine_on_cpu)}
    for recipe in RECIPES:
        found[f"quantised {recipe}"] = quantised(recipe)
        made = custom_recipe(recipe)
        transformer_engine.recipe_of = lambda name, made=made: made
        for name in NAMES:
            for product, dtype, recompute in CASES[recipe]:
                case = f"{recipe}, {name}, {dtype} by {product}{', recomputed' if recompute else ''}"
                found[case] = compared(groups, layout, name, recipe, dtype, recompute, product)
    everyone: list = [None] * LAYOUTS[layout]
    dist.all_gather_object(everyone, found)
    platform.shutdown()
    return {
        case: {
            "equal": sorted(set.intersection(*(set(rank[case]["equal"]) for rank in everyone))),
            "different": {n: far for rank in everyone for n, far in rank[case]["different"].items()},
        }
        for case in found
    }


def compared(groups, layout, name, recipe, dtype, recompute, product) -> dict:
    """Outputs and gradients of both models on the same batches: names of the equal, and how far others are apart."""
    import torch
    from tiny.models import packed_batches

    ours, theirs = (model(groups, layout, name, recipe, dtype, recompute, by) for by in (product, "te"))
    pairs = {"keys of a checkpoint": [torch.ones(())] * 2}
    assert ours.sharded_state_dict().keys() == theirs.sharded_state_dict().keys()
    odd = product.endswith("torch") and not layout.endswith("sp")  # rows that Transformer Engine needs filled up
    for b, s, said in [(10, 16, ""), (1, 11, ", 11 tokens")][: 1 + odd]:
        (batch,) = packed_batches(ours.spec, 1, b=b, s=s)
        results = [outputs_and_gradients(one, batch) for one in (ours, theirs)]
        pairs |= {f"{n}{said}": (value, results[1][n]) for n, value in results[0].items()}
    before = results[1]["log-probs"]
    with torch.no_grad():
        for one in (ours, theirs):
            for _, tensor, _ in one.table():
                tensor.data.view(-1).mul_(2.0)  # as through the buffer that an optimizer writes
        pairs["log-probs of changed weights"] = (ours(batch)[1], theirs(batch)[1])
    assert not torch.equal(before, pairs["log-probs of changed weights"][1])
    apart = {n: float((a - b).abs().max() / b.abs().max()) for n, (a, b) in pairs.items() if not torch.equal(a, b)}
    return {"equal": [n for n in pairs if n not in apart], "different": apart}


def outputs_and_gradients(model, batch) -> dict:
    model.zero_grad()
    loss, logprobs = model(batch)
    loss.backward()
    gradients = {name: tensor.grad for name, tensor, _ in model.table()}
    return {"loss": loss.detach(), "log-probs": logprobs.detach(), **gradients}


def model(groups, layout, name, recipe, dtype, recompute, by):
    import torch

    from prism_kernels.backends import SelectedBackend
    from prism_mcore.model.build import DTYPES, build_chunks
    from prism_mcore.model.fp8 import Fp8
    from prism_mcore.model.ops import Ops

    device, spec = torch.device("cpu"), fitting(name)
    said, _, product = by.rpartition(" ")
    ops = Ops({"fp8_linear": "reference" if by == "te" else product}, device)
    if by == "te":
        ops.backends["fp8_linear"] = SelectedBackend(by, "what is compared", False)
    fp8 = Fp8(recipe, ops, groups.tp)
    if said != "whole":
        amax_of_shard, fp8.whole_amax = fp8.whole_amax, lambda x, sharded: amax_of_shard(x, False)
    (made,) = build_chunks(
        spec,
        [list(range(len(spec.pattern)))],
        groups,
        ops,
        dtype=DTYPES[dtype],
        device=device,
        sequence_parallel=layout.endswith("sp"),
        recompute=frozenset(recompute),
        fp8=fp8,
    )
    made.initialise(3)
    return made


def fitting(name):
    """The tiny models with shapes that FP8 takes on each of two ranks."""
    from tiny.models import SPECS

    spec = replace(SPECS[name], hidden_size=64, head_dim=16, ffn_size=160)
    return replace(spec, mamba_num_heads=32, mamba_head_dim=4) if spec.mamba_num_heads else spec


def custom_recipe(name):
    """Transformer Engine's reference quantisers as one of its recipes."""
    import torch
    from transformer_engine.common.recipe import CustomRecipe
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    def tensorwise(role):
        gradient = role is not None and role.tensor_type == "grad_output"
        dtype = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
        return CurrentScalingQuantizerRef(dtype=dtype, pow_2_scales=True)

    if name == "tensorwise":
        return CustomRecipe(qfactory=tensorwise)
    from tiny.engine_blocks import blockwise

    return CustomRecipe(qfactory=blockwise)


def quantised(recipe) -> dict:
    """FP8 numbers and their scales of odd matrices, in both directions and as a weight."""
    import torch

    from prism_kernels.quantize import reference

    made, good = custom_recipe(recipe).qfactory, {}
    for seed, (m, k) in enumerate(((160, 208), (16, 48), (128, 256), (3, 130))):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(m, k, generator=generator) * torch.randn(k, generator=generator).mul(3).exp()
        x[: m // 2, : k // 2] = 0.0
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("input", "weight", "grad_output"):
                quantiser = made(SimpleNamespace(tensor_type=kind))
                theirs = quantiser._quantize(x.to(dtype))
                if kind == "weight":
                    w = x.to(dtype)
                    ours = [reference.fp8_quantize_weight(y, recipe, quantiser.dtype) for y in (w, w.t())]
                else:
                    ours = list(reference.fp8_quantize(x.to(dtype), recipe, quantiser.dtype))
                same = all(
                    torch.equal(one.data.view(torch.uint8), data.view(torch.uint8))
                    and torch.equal(one.scale_inv.flatten(), laid_out(scale, quantiser, data.shape).flatten())
                    for one, data, scale in zip(ours, theirs[::2], theirs[1::2], strict=True)
                )
                good[f"{kind} [{m}, {k}] {str(dtype)[6:]}"] = same
    return {"equal": [n for n in good if good[n]], "different": {n: 1.0 for n in good if not good[n]}}


def laid_out(scale, quantiser, shape):
    """Scales as they belong to rows, not as a product on a GPU reads them."""
    if not hasattr(quantiser, "tile"):
        return scale
    from tiny.engine_blocks import REFERENCE

    return REFERENCE.scale_munger.demunge_scale_shape_from_backend(shape, scale, quantiser.tile)


def quantisers_scale_by_powers_of_two(ours, engine_on_cpu) -> dict:
    """Of the recipes that run on a GPU: what a linear's quantisers there would be."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    formats = {"tensorwise": ["E4M3", "E4M3", "E5M2"], "blockwise": ["E4M3"] * 3}
    classes = {"tensorwise": Float8CurrentScalingQuantizer, "blockwise": Float8BlockQuantizer}
    good: dict[str, bool] = {}
    for name in formats:
        with engine_on_cpu.there_is_a_gpu(), te.autocast(enabled=True, recipe=ours.recipe_of(name)):
            linear = te.Linear(32, 32, bias=False, device="cpu")
            linear.init_fp8_metadata()
        forward, backward = linear.quantizers["scaling_fwd"], linear.quantizers["scaling_bwd"]
        for kind, one, form in zip(
            ("x", "weight", "gradient"), (*forward[:2], backward[0]), formats[name], strict=True
        ):
            right = isinstance(one, classes[name]) and form in repr(one.dtype)
            good[f"{name}, {kind}"] = right and one.force_pow_2_scales
    return {"equal": [n for n in good if good[n]], "different": {n: 1.0 for n in good if not good[n]}}


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LAYOUTS)
def found(request):
    results = processes(request.param)
    if folder := os.environ.get("TE_RESULTS"):  # a record of what was equal
        (Path(folder) / f"{request.param}.json").write_text(json.dumps(results))
    return results


def test_every_output_and_gradient_has_the_same_bits(found):
    """With weights doubled in place, too: none that was kept in FP8 is read. Checkpoints have the same keys.

    What is left is the order of sums, and subnormal numbers.
    """
    assert len(found) == 1 + sum(1 + len(NAMES) * len(CASES[recipe]) for recipe in RECIPES)
    for case, names in found.items():
        if bound := closeness(case):
            assert max(names["different"].values(), default=0) < bound, case
        else:
            assert not names["different"] and len(names["equal"]) > 5, case


if __name__ == "__main__":
    print(json.dumps(found_by_a_rank(sys.argv[1])))
