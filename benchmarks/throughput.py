"""Training throughput of a recipe's shape, or of a few of its layers, on synthetic tokens.

    torchrun --nproc_per_node 8 benchmarks/throughput.py --recipe launch/recipes/paper/granite-3.3-8b-mcs.yaml
    torchrun --nproc_per_node 1 benchmarks/throughput.py --recipe ... --layers 8 train.global_batch=2 parallel.tp=1

Prints tokens/s, model TFLOP/s and MFU per device (where the peak is known), peak memory, and where the time goes. The
step is timed without timers inside; the breakdown comes from further steps with megatron-core's timers, which wait for
the device at every border, so that its parts sum to more than the step. No peer runs here: benchmarks/training_step.py
has one.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from prism_mcore import platform
from prism_mcore.batch import PackedBatch
from prism_mcore.config import SettingsError, load
from prism_mcore.model.build import chunks_of
from prism_mcore.model.flops import flops_per_token
from prism_mcore.model.settings import resolve_spec
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import Groups, init_groups
from prism_mcore.plan.throughput import peak_flops
from prism_mcore.train.checks import check
from prism_mcore.train.metrics import peak_memory_gb
from prism_mcore.train.optimizer import build_optimizer, update
from prism_mcore.train.run import wrap_chunks
from prism_mcore.train.settings import MidtrainSettings
from prism_mcore.train.step import backward

# megatron-core's timers that a step of ours passes through.
PHASES = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "gradients over data-parallel ranks",
    "non-tensor-parallel-grads-all-reduce": "gradients of replicated weights",
    "embedding-grads-all-reduce": "tied embedding's gradient",
    "optimizer-copy-to-main-grad": "gradients to the optimizer's shards",
    "optimizer-inner-step": "optimizer",
    "optimizer-copy-main-to-model-params": "weights from the optimizer's shards",
    "params-all-gather": "weights over data-parallel ranks",
}


def synthetic_batches(settings: MidtrainSettings, spec: ModelSpec, groups: Groups) -> list[PackedBatch]:
    """This rank's micro-batches of one step: random tokens, every row one document."""
    b, s = settings.train.micro_batch, settings.data.seq_len
    generator = torch.Generator().manual_seed(groups.dp_rank)
    batches = []
    for number in range(settings.num_micro_batches(groups.world_size)):
        tokens = torch.randint(spec.vocab_size, (b, s + 1), generator=generator)
        batches.append(
            PackedBatch(
                tokens=tokens[:, :-1],
                labels=tokens[:, 1:],
                loss_mask=torch.ones(b, s, dtype=torch.bool),
                position_ids=torch.arange(s).repeat(b, 1),
                seq_idx=torch.arange(b, dtype=torch.int32)[:, None].repeat(1, s),
                cu_seqlens=torch.arange(0, b * s + 1, s, dtype=torch.int32),
                max_seqlen=s,
                num_tokens=b * s,
                source_ids=torch.zeros(b, dtype=torch.int32),
                sample_ids=torch.arange(number * b, (number + 1) * b),
            )
        )
    return batches


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Step:
    """A training step at the settings' shape, on the same synthetic batch every time."""

    def __init__(self, settings: MidtrainSettings, spec: ModelSpec, groups: Groups, device: torch.device):
        chunks = chunks_of(
            settings, spec, groups, device, seq_len=settings.data.seq_len, recompute=settings.train.recompute
        )
        with torch.no_grad():
            for chunk in chunks:
                for tensor in chunk.parameters():
                    tensor.normal_(std=0.02)
        self.groups, self.lr = groups, settings.optimizer.lr
        self.chunks = wrap_chunks(settings, chunks, groups, device)
        self.optimizer = build_optimizer(self.chunks, settings.optimizer, groups)
        self.batches = synthetic_batches(settings, spec, groups)

    def __call__(self) -> None:
        stats = backward(self.chunks, self.optimizer, self.batches, self.groups, num_sources=1)
        update(self.optimizer, stats.grad_norm, self.lr)

    def timed(self, steps: int) -> list[float]:
        """Seconds of each step, the slowest rank's."""
        seconds = []
        for _ in range(steps):
            dist.barrier()
            wait_for_device()
            begun = perf_counter()
            self()
            wait_for_device()
            seconds.append(perf_counter() - begun)
        slowest = torch.tensor(seconds, dtype=torch.float64, device=next(self.chunks[0].parameters()).device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.tolist()

    def phases(self, steps: int) -> dict[str, float]:
        """Seconds per step of each phase on this rank."""
        from megatron.core.timers import Timers

        timers = Timers(log_level=2, log_option="max")
        configs = [*(chunk.config for chunk in self.chunks), self.optimizer.config]
        for config in configs:
            config.timers = timers
        for _ in range(steps):
            self()
        for config in configs:
            config.timers = None
        return {
            text: timers(name).elapsed(reset=False) / steps for name, text in PHASES.items() if name in timers._timers
        }


def report(settings: MidtrainSettings, spec: ModelSpec, groups: Groups, step: Step, steps: int) -> dict:
    """Measure and describe; the same on every rank but for phases and memory, which are rank 0's."""
    step.timed(2)
    seconds = step.timed(steps)
    best, tokens = min(seconds), settings.train.global_batch * settings.data.seq_len
    flops = flops_per_token(spec, settings.data.seq_len) * tokens / groups.world_size / best
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "world_size": groups.world_size,
        "layout": settings.parallel.model_dump(),
        "sublayers": spec.pattern,
        "precision": settings.precision.model_dump(),
        "tokens_per_step": tokens,
        "step_s": {"min": best, "median": sorted(seconds)[len(seconds) // 2], "max": max(seconds)},
        "tokens_per_s": tokens / best,
        "tflops_per_device": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "peak_memory_gb": peak_memory_gb(),
        "phases_s": step.phases(max(2, steps // 3)),
    }


def show(result: dict) -> None:
    """A table of the result."""
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] else ""
    title = (
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['tflops_per_device']:.3g} TFLOP/s per device{mfu},"
        f" peak {result['peak_memory_gb']:.2f} GB on rank 0 ({result['device']} x {result['world_size']})"
    )
    table = Table("phase of a step (rank 0)", "ms", title=title)
    for phase, seconds in result["phases_s"].items():
        table.add_row(phase, f"{1e3 * seconds:.1f}")
    times = result["step_s"]
    table.add_section()
    table.add_row(
        "whole step, without timers: min / median / max",
        " / ".join(f"{1e3 * times[key]:.1f}" for key in ("min", "median", "max")),
    )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="YAML file with the settings")
    parser.add_argument("--layers", type=int, metavar="K", help="only the first K sub-layers of the model")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the result")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings that differ")
    arguments = parser.parse_intermixed_args()
    device = platform.start()
    try:
        settings = load(MidtrainSettings, arguments.recipe, arguments.overrides)
        spec = resolve_spec(settings.model)
        spec = replace(spec, pattern=spec.pattern[: arguments.layers])
        check(settings, spec, dist.get_world_size())
    except SettingsError as error:
        sys.exit(f"{arguments.recipe}: {error}")
    groups = init_groups(settings.parallel, settings.run.seed)
    step = Step(settings, spec, groups, device)
    result = report(settings, spec, groups, step, arguments.steps)
    if groups.rank == 0:
        show(result)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
