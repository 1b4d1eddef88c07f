"""HybridModel: isolated documents, recompute, precision, and an initialisation that knows no layout."""

import pytest
import torch
from ranks import run_ranks
from tiny.models import SPECS, packed_batch, packed_batches, random_documents

from prism_kernels.boundaries import Boundaries, document_ends
from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.model.parameters import parameters
from prism_mcore.model.split import split_layers
from prism_mcore.model.tensors import draw, gather, shard

CPU = torch.device("cpu")


def build(groups, spec, dtype=torch.float32, device=CPU, **options):
    split = split_layers(spec, groups.pp_size, groups.vpp, seq_len=32)
    return build_chunks(spec, split, groups, Ops({}, CPU), dtype=dtype, device=device, **options)


def logprobs_and_gradients(model, batch):
    model.zero_grad()
    loss, logprobs = model(batch)
    loss.backward()
    return logprobs, {name: p.grad.clone() for name, p in model.named_parameters()}


def packed_and_alone(groups, spec_name):
    """Four documents packed into two rows, and each of them as a batch of its own."""
    spec = SPECS[spec_name]
    (model,) = build(groups, spec)
    model.initialise(3)
    documents = random_documents(spec, b=2, s=32, generator=torch.Generator().manual_seed(1))
    together, gradients = logprobs_and_gradients(model, packed_batch(documents, 32))
    alone, summed = [], {}
    for document in documents:
        logprobs, part = logprobs_and_gradients(model, packed_batch([document], len(document)))
        alone.append(logprobs)
        summed = {name: summed.get(name, 0) + gradient for name, gradient in part.items()}
    # The last token's label wraps around to another document when packed, to its own first when alone.
    keep = torch.cat([torch.arange(len(d)) < len(d) - 1 for d in documents])
    return together[keep], torch.cat(alone)[keep], gradients, summed


@pytest.mark.parametrize("spec_name", SPECS)
def test_a_packed_document_is_computed_as_it_is_alone(spec_name):
    together, alone, gradients, summed = run_ranks(1, packed_and_alone, spec_name)[0]
    assert (together - alone).abs().max() <= 1e-6 * alone.abs().max()
    for name, gradient in gradients.items():
        assert (gradient - summed[name]).abs().max() <= 1e-5 * summed[name].abs().max(), name


def recomputed(groups, spec_name, recompute):
    spec = SPECS[spec_name]
    (model,) = build(groups, spec, recompute=frozenset(recompute))
    model.initialise(3)
    kept = []

    def count(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss, _ = model(packed_batches(spec, 1)[0])
    loss.backward()
    num_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
    return num_bytes, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", "M*-")
def test_recompute_keeps_less_and_changes_no_bit(kind):
    (kept_bytes, gradients), (fewer_bytes, again) = (run_ranks(1, recomputed, "hybrid", r)[0] for r in ("", kind))
    assert fewer_bytes < kept_bytes
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def initial_weights(groups, spec_name):
    named = {}
    for chunk in build(groups, SPECS[spec_name]):
        chunk.initialise(5)
        named |= {name: tensor.detach() for name, tensor, _ in chunk.table()}
    return named


@pytest.mark.parametrize("spec_name", SPECS)
def test_every_layout_starts_from_the_same_weights(spec_name):
    spec = SPECS[spec_name]
    table = parameters(spec, tp=2)
    ranks = run_ranks(4, initial_weights, spec_name, tp=2, pp=2)
    for stage in (ranks[:2], ranks[2:]):
        for name in stage[0]:
            assert torch.equal(gather([rank[name] for rank in stage], table[name]), draw(name, table[name], 5)), name
    assert set(ranks[0]) | set(ranks[2]) == set(table)


def test_slices_of_every_parameter_make_the_whole_again():
    for spec in SPECS.values():
        for name, parameter in parameters(spec, tp=2).items():
            whole = draw(name, parameter, 0)
            slices = [shard(whole, parameter, rank, 2) for rank in range(2)]
            assert torch.equal(gather(slices, parameter), whole), name
            if parameter.tp_axis is not None:
                assert slices[0].numel() < whole.numel()


def loss_in(groups, dtype):
    (model,) = build(groups, SPECS["hybrid"], dtype=dtype)
    model.initialise(3)
    loss, _ = model(packed_batches(SPECS["hybrid"], 1)[0])
    return loss.item(), {name: p.dtype for name, p in model.named_parameters()}


def test_bf16_keeps_scan_parameters_in_fp32_and_is_close_to_fp32():
    loss, dtypes = run_ranks(1, loss_in, torch.bfloat16)[0]
    exact, _ = run_ranks(1, loss_in, torch.float32)[0]
    assert loss == pytest.approx(exact, rel=2e-2) and loss != exact
    fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert fp32 == {name for name in dtypes if name.endswith((".A_log", ".D", ".dt_bias"))}


def shapes_on_meta(groups, spec_name):
    chunks = build(groups, SPECS[spec_name], device=torch.device("meta"))
    return [{name: (str(t.device), tuple(t.shape)) for name, t, _ in chunk.table()} for chunk in chunks]


def test_the_meta_device_allocates_nothing():
    (chunk,) = run_ranks(1, shapes_on_meta, "granite hybrid")[0]
    table = parameters(SPECS["granite hybrid"])
    assert chunk == {name: ("meta", parameter.shape) for name, parameter in table.items()}


def test_transformer_engine_is_given_documents_and_no_padding():
    boundaries = Boundaries(torch.tensor([0, 3, 3, 8, 8, 8, 8, 8, 8], dtype=torch.int32))
    ends = document_ends(boundaries)
    assert ends.tolist() == [0, 3, 8] and ends.dtype == torch.int32


def modules_of_a_gpu(groups):
    """Where Transformer Engine would put its weights for a GPU, and how the embedding is read in deterministic mode."""
    from megatron.core.extensions import transformer_engine

    from prism_mcore.model.context import transformer_config

    is_te_min_version, current_device = transformer_engine.is_te_min_version, torch.cuda.current_device
    transformer_engine.is_te_min_version, torch.cuda.current_device = lambda version: True, lambda: 3
    try:
        config = transformer_config(SPECS["hybrid"], groups, torch.bfloat16, False, torch.device("cuda", 3))
        device = transformer_engine._get_extra_te_kwargs(config)["device"]
    finally:
        transformer_engine.is_te_min_version, torch.cuda.current_device = is_te_min_version, current_device
    torch.use_deterministic_algorithms(True)
    try:
        (chunk,) = build(groups, SPECS["hybrid"])
    finally:
        torch.use_deterministic_algorithms(False)
    return device, chunk.embedding.deterministic_mode


def test_transformer_engine_makes_weights_on_the_gpu_and_deterministic_mode_reaches_megatron():
    assert run_ranks(1, modules_of_a_gpu) == [(3, True)]
