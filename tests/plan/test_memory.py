"""The memory plan counts what the model really holds and keeps."""

import pytest
import torch
from ranks import run_ranks
from tiny.models import SPECS, packed_batch

from prism_mcore.evaluate.settings import ScoreSettings
from prism_mcore.model.build import build_chunks
from prism_mcore.model.fp8 import Fp8
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import read_spec
from prism_mcore.model.split import split_layers
from prism_mcore.plan.memory import kept_bytes_per_token, kept_weight_bytes, plan_memory

CPU = torch.device("cpu")


def settings(**sections) -> ScoreSettings:
    """Of a program that has little else than what the plan reads."""
    return ScoreSettings.model_validate(sections)


def chunks_of(groups, spec, dtype, seq_len, sequence_parallel=False, fp8="off"):
    split = split_layers(spec, groups.pp_size, groups.vpp, seq_len)
    ops = Ops({"fp8_linear": "reference"}, CPU)
    shared = None if fp8 == "off" else Fp8(fp8, ops, groups.tp)
    return build_chunks(
        spec, split, groups, ops, dtype=dtype, device=CPU, sequence_parallel=sequence_parallel, fp8=shared
    )


def count_parameters(groups, name):
    return groups.pp_rank, sum(
        p.numel() for c in chunks_of(groups, SPECS[name], torch.float32, 16) for p in c.parameters()
    )


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_parameters_per_rank_are_those_of_the_model(name, layout):
    # 61 tokens over 2 ranks, one SSM group, tied embeddings over stages
    plan = plan_memory(settings(parallel=layout), SPECS[name], 2, seq_len=16)
    for stage, count in run_ranks(2, count_parameters, name, **layout):
        assert plan[stage].parameters == count


def bytes_kept(groups, name, dtype, sequence_parallel, fp8="off"):
    """Bytes per token that each kind of sub-layer saves for its backward pass, weights aside."""
    spec, seq_len = read_spec(name), 256
    (chunk,) = chunks_of(groups, spec, dtype, seq_len, sequence_parallel, fp8)
    chunk.initialise(0)
    seq = chunk._sequence(packed_batch([torch.arange(seq_len)], seq_len))
    weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    kept = {}
    for index, kind in enumerate(spec.pattern):
        storages = {}
        rows = seq_len // groups.tp_size if sequence_parallel else seq_len
        x = torch.randn(rows, 1, spec.hidden_size, dtype=dtype, requires_grad=True)

        def note(tensor, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            chunk.layers[str(index)](x, seq)
        # Mamba's projection has hooks of its own (`ColumnLinearOfParts`), so that these do not see its input.
        unseen = x.nbytes if kind == "M" and fp8 == "off" else 0
        kept[kind] = (sum(storages.values()) + unseen) / seq_len
    return kept


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("name", "dtype"), [("demo-dense", torch.bfloat16), ("demo-hybrid", torch.float32)])
def test_sub_layers_keep_what_is_planned(name, dtype, ranks, sequence_parallel):
    spec = read_spec(name)
    for kept in run_ranks(ranks, bytes_kept, name, dtype, sequence_parallel, tp=ranks):
        planned = {kind: kept_bytes_per_token(spec, kind, ranks, sequence_parallel, dtype.itemsize)[1] for kind in kept}
        assert kept["-"] == pytest.approx(planned["-"], rel=0.01)
        # The plan is of fused operations; the reference copies queries and keys, and convolves in fp32.
        assert planned["*"] < kept["*"] < 1.6 * planned["*"]
        if "M" in kept:
            assert planned["M"] < kept["M"] < 3 * planned["M"]


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, True)])
@pytest.mark.parametrize("name", ["demo-dense", "demo-hybrid"])
def test_sub_layers_in_fp8_keep_what_is_planned(name, ranks, sequence_parallel):
    spec, dtype = read_spec(name), torch.float32
    for kept in run_ranks(ranks, bytes_kept, name, dtype, sequence_parallel, "tensorwise", tp=ranks):
        planned = {kind: kept_bytes_per_token(spec, kind, ranks, sequence_parallel, 4, True)[1] for kind in kept}
        assert kept["-"] == pytest.approx(planned["-"], rel=0.01)
        assert all(planned[kind] < kept[kind] < 3 * planned[kind] for kind in kept if kind != "-")
    more, less = (plan_memory(settings(precision={"fp8": fp8}), spec, 1, seq_len=256) for fp8 in ("off", "blockwise"))
    assert less[0].activations < more[0].activations


def test_sizes_follow_from_precision_and_layout():
    spec, seq_len = read_spec("llama-3.1-8b"), 8192
    count = 8_030_261_248
    (one,) = plan_memory(settings(), spec, 1, seq_len=seq_len)
    assert (one.weights, one.gradients, one.optimizer) == (2 * count, 4 * count, 12 * count)
    (halved,) = plan_memory(settings(), spec, 1, seq_len=seq_len, masters="remainder")
    assert (halved.optimizer, halved.saved) == (10 * count, one.saved)
    (sharded,) = plan_memory(settings(), spec, 16, seq_len=seq_len)
    assert sharded.optimizer == 12 * count / 16
    layout = {"optimizer_instances": 4}
    (replicated,) = plan_memory(settings(parallel=layout), spec, 16, seq_len=seq_len)
    assert replicated.optimizer == 12 * count / 4
    (full,) = plan_memory(settings(precision={"dtype": "fp32"}), spec, 1, seq_len=seq_len)
    assert (full.weights, full.optimizer) == (4 * count, 8 * count)  # no second copy of fp32 weights


def test_weights_that_decoding_keeps_in_fp8_are_those_of_the_large_linears():
    spec = read_spec("llama-3.1-8b")
    mine = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    assert kept_weight_bytes(settings(), spec) == 0
    assert kept_weight_bytes(settings(precision={"fp8": "blockwise"}, parallel={"tp": 2}), spec) == mine // 2


def test_recompute_and_pipeline_change_activations_as_they_should():
    spec, seq_len = read_spec("llama-3.1-8b"), 8192
    (kept,) = plan_memory(settings(), spec, 1, seq_len=seq_len)
    (again,) = plan_memory(settings(), spec, 1, seq_len=seq_len, recompute=["attention", "mlp"])
    working = 8192 * kept_bytes_per_token(spec, "-", 1, False, 2)[1]
    assert again.activations == 64 * 8192 * 4096 * 2 + working  # one hidden state per sub-layer
    stages = plan_memory(settings(parallel={"pp": 4}), spec, 4, seq_len=seq_len, micro_batches=8)
    per_layer = [(stage.activations - working) / stage.layers for stage in stages]
    # 1F1B: stage k of 4 holds 4 - k micro-batches
    assert [round(x / (kept.activations - working) * 64) for x in per_layer] == [4, 3, 2, 1]


def test_one_ssm_group_is_on_every_rank():
    one, several = read_spec("granite-4.0-h-micro"), read_spec("nemotron-h-8b")
    for spec, replicated in ((one, 4 * 128 * 2), (several, 0)):
        outer = 2 * spec.hidden_size * 2
        whole, half = (kept_bytes_per_token(spec, "M", tp, False, 2)[1] - outer for tp in (1, 2))
        assert 2 * half - whole == replicated  # [B|C] before and after the convolution, bf16


@pytest.mark.parametrize(("tp", "micro_batch"), [(1, 1), (2, 1), (1, 6)])
def test_the_loss_is_planned_as_its_kernel_allocates(tp, micro_batch):
    from prism_kernels.loss.reference import Shard
    from prism_kernels.loss.triton import _Chunk, _Plan, _WeightGradient

    spec, tokens = read_spec("llama-3.1-8b"), 8192 * micro_batch
    rows = spec.vocab_size // tp
    (stage,) = plan_memory(settings(parallel={"tp": tp}), spec, tp, seq_len=8192, micro_batch=micro_batch)
    hidden, weight = (torch.empty(n, spec.hidden_size, dtype=torch.bfloat16, device="meta") for n in (tokens, rows))
    kernel = _Plan(Shard(0, rows, None), 1.0, None, False, False)
    chunk = _Chunk(kernel.tokens(hidden), rows, hidden, kernel)
    gradient = _WeightGradient(weight, rows, -(-tokens // kernel.tokens(hidden)))
    allocated = [hidden, chunk.logits, gradient.total]
    if gradient.total.dtype != weight.dtype:
        allocated.append(gradient.result())
    assert stage.loss == pytest.approx(sum(tensor.nbytes for tensor in allocated), rel=0.03)


def bytes_of_a_save(groups, name):
    from prism_mcore.checkpoint.sharded import describe_model, own_tensors
    from prism_mcore.train.optimizer import build_optimizer, wrap
    from prism_mcore.train.settings import OptimizerSettings

    chunks = chunks_of(groups, SPECS[name], torch.bfloat16, 16)
    optimizer = build_optimizer(wrap(chunks, groups), OptimizerSettings(), groups)
    written = own_tensors(describe_model(chunks, groups), optimizer, groups, {})
    return sum(tensor.nbytes for piece, tensor in written if not piece.key.startswith("random."))


@pytest.mark.parametrize("name", SPECS)
def test_a_save_writes_what_the_plan_says(name):
    (stage,) = plan_memory(settings(precision={"dtype": "bf16"}), SPECS[name], 2, seq_len=16)
    written = run_ranks(2, bytes_of_a_save, name)
    assert 0 <= 2 * stage.saved - sum(written) < 2
    assert max(written) <= 1.1 * stage.saved
