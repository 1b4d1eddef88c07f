"""A CPU training step of ours beside transformers + torch, same shape, same weights' sizes, same tokens.

    python benchmarks/training_step.py [--shape dense|hybrid] [--dtype fp32|bf16] [--steps 12] [--threads 2]

Steps are interleaved (one of ours, one of theirs, ...) and the minima compared. Peak memory is measured in a process of
its own for each side, theirs without our allocator settings: the high-water mark over the steps less what was resident
when model and optimizer were built.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter

import psutil
import torch

from prism_mcore import platform
from prism_mcore.batch import PackedBatch
from prism_mcore.model.spec import ModelSpec, spec_from_config
from prism_mcore.parallel import Groups, ParallelSettings, init_groups

B, S, VOCAB = 4, 512, 8192
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# About 10 million parameters each.
SHAPES = {
    "dense": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 256,
        "head_dim": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 8,
        "intermediate_size": 768,
        "max_position_embeddings": S,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    },
    "hybrid": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "chunk_size": 128,
        "conv_kernel": 4,
        "head_dim": 32,
        "hidden_size": 256,
        "hybrid_override_pattern": "M-M-M-*-M-M-M-",
        "intermediate_size": 1024,
        "layer_norm_epsilon": 1e-5,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 8,
        "max_position_embeddings": S,
        "mlp_hidden_act": "relu2",
        "n_groups": 2,
        "num_attention_heads": 8,
        "num_hidden_layers": 14,
        "num_key_value_heads": 4,
        "ssm_state_size": 64,
        "tie_word_embeddings": False,
        "time_step_limit": [0.0, float("inf")],
        "use_conv_bias": True,
        "vocab_size": VOCAB,
    },
}


def batch() -> PackedBatch:
    """B rows of S random tokens, each row one document."""
    tokens = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(0))
    return PackedBatch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        loss_mask=torch.ones(B, S, dtype=torch.bool),
        position_ids=torch.arange(S).expand(B, S),
        seq_idx=torch.arange(B, dtype=torch.int32)[:, None].expand(B, S),
        cu_seqlens=torch.arange(0, B * S + 1, S, dtype=torch.int32),
        max_seqlen=S,
        num_tokens=B * S,
        source_ids=torch.zeros(B, dtype=torch.int32),
        sample_ids=torch.arange(B),
    )


@cache
def one_rank() -> Groups:
    return init_groups(ParallelSettings())


def our_step(spec: ModelSpec, dtype: torch.dtype) -> Callable[[], float]:
    """Model through megatron-core's linears and schedule, DDP buffers, distributed optimizer on one rank."""
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.train.optimizer import build_optimizer, update, wrap
    from prism_mcore.train.settings import OptimizerSettings
    from prism_mcore.train.step import backward

    device, groups = torch.device("cpu"), one_rank()
    settings = OptimizerSettings(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip_grad=CLIP)
    layers = list(range(len(spec.pattern)))
    chunks = build_chunks(spec, [layers], groups, Ops({}, device), dtype=dtype, device=device)
    chunks[0].initialise(0)
    wrapped = wrap(chunks, groups)
    optimizer = build_optimizer(wrapped, settings, groups)
    batches = [batch()]

    def step() -> float:
        stats = backward(wrapped, optimizer, batches, groups, num_sources=1)
        update(optimizer, stats.grad_norm, LR)
        return stats.loss

    return step


def their_step(config: dict, dtype: torch.dtype) -> Callable[[], float]:
    """transformers' model with SDPA attention and torch's fused AdamW; in bf16 its moments are bf16, too."""
    import transformers

    hf_config = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    tokens = batch().tokens

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def build(side: str, shape: str, dtype: str) -> Callable[[], float]:
    """`ours` or `theirs`."""
    config = SHAPES[shape]
    return our_step(spec_from_config(config), DTYPES[dtype]) if side == "ours" else their_step(config, DTYPES[dtype])


def compare_times(shape: str, dtype: str, steps: int) -> tuple[float, float]:
    """Fastest of `steps` interleaved steps of each side, seconds."""
    sides = [build("ours", shape, dtype), build("theirs", shape, dtype)]
    times: list[list[float]] = [[], []]
    for number in range(steps + 2):
        for side, seconds in zip(sides, times, strict=True):
            begun = perf_counter()
            side()
            if number >= 2:  # two to warm up
                seconds.append(perf_counter() - begun)
    return min(times[0]), min(times[1])


def peak_memory_mb(side: str, shape: str, dtype: str, threads: int) -> float:
    """What three steps of one side add to the resident memory of a fresh process, MB."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        side,
        "--shape",
        shape,
        "--dtype",
        dtype,
        "--threads",
        str(threads),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(side: str, shape: str, dtype: str) -> float:
    step = build(side, shape, dtype)
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here, not at the parent's
    for _ in range(3):
        step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) * 1024 - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--steps", type=int, default=12, help="interleaved steps of each side (default 12)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--memory-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of == "theirs":
        torch.set_num_threads(arguments.threads)
    else:
        platform.start(threads=arguments.threads)
    shapes, dtypes = arguments.shape or list(SHAPES), arguments.dtype or list(DTYPES)
    if arguments.memory_of:
        print(measure_memory(arguments.memory_of, shapes[0], dtypes[0]))
        return
    results = []
    for shape in shapes:
        for dtype in dtypes:
            ours, theirs = compare_times(shape, dtype, arguments.steps)
            memory = [peak_memory_mb(side, shape, dtype, arguments.threads) for side in ("ours", "theirs")]
            print(
                f"{shape:6} {dtype}: ours {1e3 * ours:6.1f} ms, transformers {1e3 * theirs:6.1f} ms,"
                f" speed x{theirs / ours:.2f};"
                f" steps add {memory[0]:.0f} MB, {memory[1]:.0f} MB (logits: {4 * B * S * VOCAB / 1e6:.0f} MB in fp32)",
                flush=True,
            )
            results.append(
                {"shape": shape, "dtype": dtype, "ours_s": ours, "transformers_s": theirs, "memory_mb": memory}
            )
    if arguments.out:
        arguments.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
