"""The CPU patches do what megatron-core needs and leave the rest of the process alone."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import RankError, run_ranks


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


START_ALONE = """
import megatron.core, torch
from prism_mcore import platform
from prism_mcore.parallel import ParallelSettings, destroy_groups, init_groups
for _ in range(2):
    assert platform.start() == torch.device("cpu")
assert init_groups(ParallelSettings()).world_size == 1
destroy_groups()
assert init_groups(ParallelSettings()).is_last_stage
platform.shutdown()
platform.shutdown()
print("alone")
"""


def test_one_process_needs_no_launcher():
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    run = subprocess.run([sys.executable, "-c", START_ALONE], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout == "alone\n", run.stderr


def test_gpu_packages_are_not_imported_on_a_cpu(tmp_path):
    (tmp_path / "transformer_engine.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    code = "from prism_mcore import platform; platform.patch_megatron(); import megatron.core.optimizer"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_more_ranks_than_gpus_are_told_how_many_there_are(monkeypatch):
    from prism_mcore import platform

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="there are 1; start torchrun with --nproc-per-node=1"):
        platform._cuda_device()


def die_on_rank_1(groups):
    if groups.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1), group=groups.dp)


def test_a_killed_rank_ends_the_others_with_an_error():
    begin = time.monotonic()
    with pytest.raises(RankError) as error:
        run_ranks(2, die_on_rank_1)
    assert "SIGKILL" in error.value.reports[1]
    assert "Connection" in error.value.reports[0]
    assert time.monotonic() - begin < 60  # not the collective's time-out
    assert run_ranks(2, cuda_calls)[1][2] is False  # and the pool serves the next test


def hang(groups):
    if groups.rank == 0:
        time.sleep(600)


def test_a_hung_rank_is_an_error_that_names_it():
    with pytest.raises(RankError, match="did not answer within 1 s") as error:
        run_ranks(2, hang, timeout_s=1)
    assert set(error.value.reports) == {0}
