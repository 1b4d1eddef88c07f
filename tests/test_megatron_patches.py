"""The patches do what megatron-core needs on a CPU and leave the rest of the process alone."""

import os
import subprocess
import sys

import torch
from ranks import run_ranks


def cuda_calls(groups):
    tensor = torch.zeros(2, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        moved = tensor.to("cuda").cuda().to(device="cuda:0", dtype=torch.float64)
    devices = {
        tensor.device.type,
        torch.ones_like(tensor, device="cuda").device.type,
        tensor.new_empty(1, device="cuda").device.type,
        torch.tensor([1.0], device=torch.cuda.current_device()).device.type,
        torch.nn.Linear(1, 1).cuda().weight.device.type,
    }
    return devices, moved.dtype, torch.cuda.is_available(), tensor.type(), torch.get_num_threads()


def test_cuda_means_cpu_but_is_still_not_available():
    assert run_ranks(1, cuda_calls) == [({"cpu"}, torch.float64, False, "torch.FloatTensor", 1)]


def fused_functions(groups):
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.jit import jit_fuser

    return [hasattr(function, "_torchdynamo_orig_callable") for function in (fused_bias_swiglu.swiglu, jit_fuser(len))]


def test_nothing_is_left_for_torch_compile():
    assert run_ranks(1, fused_functions) == [[False, False]]


def seeds(groups):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    return torch.equal(first, expected), torch.equal(torch.rand(3), expected)


def test_the_cpu_generator_plays_the_cuda_generator():
    assert run_ranks(1, seeds) == [(True, True)]


def transformers_forward(groups):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    return loss.item(), model.model.embed_tokens.weight.grad.abs().sum().item()


def test_transformers_trains_in_the_same_process():
    loss, grad = run_ranks(1, transformers_forward)[0]
    assert 2 < loss < 5
    assert grad > 0


def test_gpu_packages_are_not_imported_on_a_cpu(tmp_path):
    (tmp_path / "transformer_engine.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    code = "from prism_mcore.megatron_patches import patch_megatron; patch_megatron(); import megatron.core.optimizer"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def reduced_and_gathered(groups):
    from megatron.core.distributed import param_and_grad_buffer as buffers

    group, whole = groups.collection.dp_cp, torch.arange(4.0)
    mine = whole.chunk(group.size())[group.rank()]
    buffers.dist_reduce_scatter_func(mine, whole, op=torch.distributed.ReduceOp.SUM, group=group, async_op=False)
    in_place, elsewhere = whole.clone(), torch.empty(4)
    buffers.dist_all_gather_func(whole, mine, group=group, async_op=False)
    buffers.dist_all_gather_func(elsewhere, mine, group=group, async_op=False)
    return in_place[2 * groups.rank :][:2].tolist(), whole.tolist(), elsewhere.tolist()


def test_collectives_into_their_own_buffer_are_left_out_on_one_rank_only():
    assert run_ranks(1, reduced_and_gathered) == [([0, 1], [0, 1, 2, 3], [0, 1, 2, 3])]
    summed = [0, 2, 4, 6]
    assert run_ranks(2, reduced_and_gathered) == [(summed[:2], summed, summed), (summed[2:], summed, summed)]
