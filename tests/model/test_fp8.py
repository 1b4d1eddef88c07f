"""FP8 products in the model: the same in every layout, in recomputation, and for a token alone and in a batch."""

import contextlib
import math

import pytest
import torch
from ranks import run_ranks
from tiny.gradients import close, losses_and_gradients
from tiny.models import SPECS, packed_batch

from prism_kernels import fp8
from prism_kernels.quantize import reference
from prism_kernels.table import OPS
from prism_mcore.config import SettingsError
from prism_mcore.generate import Engine, EngineSettings
from prism_mcore.generate.settings import GenerateSettings
from prism_mcore.model.build import build_chunks, fp8_of
from prism_mcore.model.fp8 import Fp8
from prism_mcore.model.ops import Ops

REFERENCE = {"fp8_linear": "reference"}
EXACT = {name: "exact" for name, op in OPS.items() if "exact" in op.backends}
RECIPES = ("tensorwise", "blockwise")
LAYOUTS = {
    "tp2+sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2 interleaved": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"cp": 2}),
    "tp2 x pp2": (4, {"tp": 2, "pp": 2}),
}
# A number on the border of two FP8 numbers falls to the one or the other by the last bit of the product before it, and
# a step of e4m3 is up to 12%: with these batches none lies there, and what is left is the rounding of products.
SEEDS = {("hybrid", "blockwise"): 1}


def in_fp8(world_size, layout, name, recipe, function=losses_and_gradients, **options):
    sequence_parallel = layout.get("sequence_parallel", False)
    options = {"kernels": REFERENCE, "seed": SEEDS.get((name, recipe), 0), **options}
    return run_ranks(world_size, keywords, function, (name, sequence_parallel), recipe, options, **layout)[0]


def keywords(groups, function, arguments, recipe, options):
    return function(groups, *arguments, fp8=recipe, **options)


def wrong(got, want, tolerance=1e-5):
    """Names of gradients that differ by more than a share of their largest element."""
    return [name for name in want[1] if not close(got[1][name], want[1][name], tolerance)]


@pytest.fixture(scope="module")
def alone():
    names = ("dense", "hybrid", "granite hybrid")
    return {(name, recipe): in_fp8(1, {}, name, recipe) for name in names for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["dense", "hybrid", "granite hybrid"])
def test_same_loss_and_gradients_in_every_layout(alone, name, recipe):
    want = alone[name, recipe]
    for layout, (world_size, degrees) in LAYOUTS.items():
        got = in_fp8(world_size, degrees, name, recipe)
        assert got[0].loss == pytest.approx(want[0].loss, rel=1e-6), layout
        assert not wrong(got, want), layout


def full_precision_scales(groups, *arguments, **options):
    """The same with scales whose mantissa is kept."""
    power_of_two, reference.power_of_two_scale = reference.power_of_two_scale, full_scale
    try:
        return losses_and_gradients(groups, *arguments, **options)
    finally:
        reference.power_of_two_scale = power_of_two


def full_scale(amax, dtype):
    return torch.where(amax > 0, fp8.LARGEST[dtype] / amax.float(), 1.0)


def test_layouts_agree_because_scales_are_powers_of_two():
    """Micro-batches of other rows have other scales; those of blocks, which lie elsewhere on two ranks, too."""
    for recipe in RECIPES:
        alone, two = (in_fp8(n, {"tp": n}, "dense", recipe, full_precision_scales) for n in (1, 2))
        split = in_fp8(1, {}, "dense", recipe, full_precision_scales, micro_batches=2)
        assert wrong(two if recipe == "blockwise" else split, alone, 1e-3), recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_splitting_a_batch_changes_nothing(alone, recipe):
    for micro_batches in (1, 2):
        got = in_fp8(1, {}, "dense", recipe, micro_batches=micro_batches)
        assert not wrong(got, alone["dense", recipe]), micro_batches


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_recomputing_changes_no_bit(alone, name, recipe):
    stats, gradients = in_fp8(1, {}, name, recipe, recompute="M*-")
    assert stats.loss == alone[name, recipe][0].loss
    assert all(torch.equal(gradients[n], want) for n, want in alone[name, recipe][1].items())


def counted_products(groups, name, ends):
    """FP8 products of a forward pass, and of one without FP8."""
    model, calls = model_in_fp8(SPECS[name], groups, ends)
    counts = []
    for precision in (contextlib.nullcontext(), model.without_fp8()):
        with torch.no_grad(), precision:
            model(batch_of(SPECS[name]))
        counts.append(len(calls))
        calls.clear()
    return counts


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_fp8_is_in_force_in_every_large_linear_but_at_the_ends(name):
    """Two products a sub-layer, Mamba's in_proj being one."""
    layers = len(SPECS[name].pattern)
    for ends in (0, 1):
        assert run_ranks(1, counted_products, name, ends) == [[2 * (layers - 2 * ends), 0]]


PRODUCERS = {"rms_norm": ("rms_norm", "add_rms_norm"), "swiglu": ("swiglu",), "squared_relu": ("squared_relu",)}
FUSED = REFERENCE | {op: "triton" for ops in PRODUCERS.values() for op in (*ops, f"{ops[0]}_quantize")}
APART = FUSED | {f"{op}_quantize": "reference" for op in PRODUCERS}  # another backend than the producer's


@pytest.mark.parametrize(("name", "recipe", "tp"), [("dense", "tensorwise", 2), ("hybrid", "blockwise", 1)])
def test_what_is_quantised_where_it_is_computed_changes_no_bit(name, recipe, tp):
    fused, apart = (in_fp8(tp, {"tp": tp}, name, recipe, kernels=k, micro_batches=1) for k in (FUSED, APART))
    assert fused[0].loss == apart[0].loss
    assert all(torch.equal(fused[1][gradient], want) for gradient, want in apart[1].items())


def counted_casts(groups, name, kernels):
    """Activations that were written in the model's format and then quantised, in a forward pass."""
    model, _ = model_in_fp8(SPECS[name], groups, kernels=kernels)
    shared, counts = model.context.fp8, []
    quantize = shared.quantize
    shared.quantize = lambda *arguments, **options: counts.append(0) or quantize(*arguments, **options)
    with torch.no_grad():
        model(batch_of(SPECS[name]))
    return len(counts)


@pytest.mark.parametrize(("name", "of_mixers"), [("dense", 2), ("hybrid", 4)])
def test_norms_and_activations_are_not_written_before_they_are_quantised(name, of_mixers):
    """What attention and the scan give is; every linear has another input."""
    assert run_ranks(1, counted_casts, name, FUSED) == [of_mixers]
    assert run_ranks(1, counted_casts, name, APART) == [2 * len(SPECS[name].pattern)]


def model_in_fp8(spec, groups, ends=0, kernels=REFERENCE, recipe="blockwise"):
    """A model whose FP8 products are written down."""
    cpu = torch.device("cpu")
    ops = Ops(kernels, cpu)
    shared = Fp8(recipe, ops, groups.tp, ends)
    product, calls = shared.product, []
    shared.product = lambda *arguments: calls.append(arguments) or product(*arguments)
    layers = [list(range(len(spec.pattern)))]
    (model,) = build_chunks(spec, layers, groups, ops, dtype=torch.float32, device=cpu, fp8=shared)
    model.initialise(7)
    return model, calls


def batch_of(spec, s=16):
    generator = torch.Generator().manual_seed(0)
    return packed_batch([torch.randint(spec.vocab_size, (s,), generator=generator) for _ in range(2)], s)


def together_and_apart(groups, name):
    model, _ = model_in_fp8(SPECS[name], groups, kernels=EXACT)
    lengths = (5, 2, 11, 1, 3)
    documents = [(torch.arange(1, n + 1) * 7) % SPECS[name].vocab_size for n in lengths]
    with torch.no_grad():
        _, together = model(packed_batch(documents, sum(lengths)))
        apart = [model(packed_batch([document], len(document)))[1] for document in documents]
    return together.flatten(), torch.cat([logprobs.flatten() for logprobs in apart]), sum(lengths)


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_blockwise_gives_a_token_the_same_bits_alone_and_in_a_batch(name):
    """The last token of a document has another label there: none."""
    ((together, apart, tokens),) = run_ranks(1, together_and_apart, name)
    labelled = torch.ones(tokens, dtype=torch.bool)
    labelled[torch.tensor([5, 2, 11, 1, 3]).cumsum(0) - 1] = False
    assert torch.equal(together[labelled], apart[labelled])


def generated(groups, name):
    """Twice with other weights: quantised weights, prefills, and log-probs beside those of a training pass."""
    model, _ = model_in_fp8(SPECS[name], groups, kernels=EXACT)
    quantize, calls = model.context.fp8.quantize_weight, []
    model.context.fp8.quantize_weight = lambda *arguments: calls.append(0) or quantize(*arguments)
    engine, prompts = Engine(model, settings=EngineSettings(prefill_tokens=8)), [[7, 3, 5], [11] * 7, [2]]
    seen = []
    for _ in range(2):
        calls.clear()
        engine.reset()
        responses = engine.generate(prompts, samples=2, max_tokens=6, seed=3)
        counted, gaps = len(calls), []
        for prompt, samples in zip(prompts, responses, strict=True):
            for response in samples:
                text = torch.tensor(prompt + list(response.completion.tokens))
                with torch.no_grad():
                    logprobs, _ = model(packed_batch([text], len(text)), temperature=1.0)
                trained = logprobs[len(prompt) - 1 : -1]
                gaps.append(float((trained - torch.tensor(response.completion.logprobs)).abs().max()))
        seen.append((counted, engine.statistics.steps, max(gaps), len(model.context.fp8.kept)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    return seen


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_decoding_reads_the_weights_that_its_prefill_quantised_and_no_older_ones(name):
    """A token has the log-prob of training to the bit, also after the weights have changed."""
    (seen,) = run_ranks(1, generated, name)
    for quantised, steps, gap, kept in seen:
        assert steps >= 5 and gap == 0 and kept == 0
        assert quantised == 2 * 2 * len(SPECS[name].pattern)  # two prefills, two products a sub-layer


def refusals(groups):
    """What building a model says: on a CPU without a word on emulation, and with CUDA 12.8 and 12.9."""
    cpu, gpu, said = torch.device("cpu"), torch.device("cuda"), []
    for device, cuda, kernels in (
        (cpu, None, {}),
        (gpu, "12.8", {"fp8_linear": "torch"}),
        (gpu, "12.9", {"fp8_linear": "torch"}),
    ):
        settings = GenerateSettings(precision={"fp8": "blockwise"}, kernels=kernels)
        version, torch.version.cuda = torch.version.cuda, cuda
        try:
            said.append(fp8_of(settings, groups, Ops(kernels, cpu), device).recipe)
        except SettingsError as error:
            said.append(str(error))
        finally:
            torch.version.cuda = version
    with pytest.raises(ValueError, match="one scale for all tokens"):
        Engine(model_in_fp8(SPECS["dense"], groups, recipe="tensorwise")[0])
    return said


def test_a_device_without_these_products_is_refused_with_what_there_is_instead():
    ((cpu, old_cuda, new_cuda),) = run_ranks(1, refusals)
    assert "cpu has no FP8 products" in cpu and "kernels.fp8_linear=reference to emulate them" in cpu
    assert "need CUDA 12.9 or later, torch was built with 12.8; use precision.fp8=tensorwise" in old_cuda
    assert new_cuda == "blockwise"


def losses_of_odd_weights(groups, recipe):
    model, _ = model_in_fp8(SPECS["dense"], groups, recipe=recipe)
    weight, losses = model.layers["0"].mixer.qkv.weight, []
    with torch.no_grad():
        for value in (0.0, torch.nan):
            weight[:16] = value
            losses.append(float(model(batch_of(SPECS["dense"]))[0]))
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_no_number_stays_visible(recipe):
    """A product with nan is nan, so that the guard sees it; zeros stay zeros."""
    ((zeros, nans),) = run_ranks(1, losses_of_odd_weights, recipe)
    assert math.isfinite(zeros) and math.isnan(nans)
