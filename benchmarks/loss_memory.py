"""What the fused loss saves: peak memory of a CPU training step beside the same step with a loss that holds its logits.

    python benchmarks/loss_memory.py [--shape dense|hybrid] [--dtype fp32|bf16] [--vocab 32768] [--out FILE.json]

The same model, batch, optimizer and allocator on both sides, each in a process of its own: the high-water mark over two
steps less what was resident when model and optimizer were built. The times are of those steps and for orientation.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from training_step import DTYPES, SHAPES, B, S, our_step

from prism_kernels.loss import reference
from prism_mcore import platform
from prism_mcore.model.spec import spec_from_config

SIDES = ("fused", "unfused")


def unfused(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    logits_divisor: float = 1.0,
    vocab_size: int,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` on one rank as it is usually written: all logits, then their cross entropy in fp32."""
    logits = F.linear(hidden, weight[:vocab_size]).float() / logits_divisor
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (nll * token_weights).sum(), -nll.detach()


def build(side: str, shape: str, dtype: str, vocab: int) -> Callable[[], float]:
    if side == "unfused":
        reference.linear_cross_entropy = unfused  # where the op table looks it up
    return our_step(spec_from_config(SHAPES[shape] | {"vocab_size": vocab}), DTYPES[dtype])


def measure(side: str, shape: str, dtype: str, vocab: int) -> dict[str, float]:
    """{"mb": what two steps add to this process's resident memory, "loss": nats per token, "step_s": the second's}."""
    step = build(side, shape, dtype, vocab)
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    loss = step()
    begun = perf_counter()
    step()
    seconds = perf_counter() - begun
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"mb": (int(status["VmHWM"].split()[0]) * 1024 - before) / 1e6, "loss": loss, "step_s": seconds}


def measure_apart(side: str, shape: str, dtype: str, vocab: int, threads: int) -> dict[str, float]:
    options = {"measure": side, "shape": shape, "dtype": dtype, "vocab": vocab, "threads": threads}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *flags]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--vocab", type=int, default=32768, help="tokens of the vocabulary (default 32768)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes, dtypes = options.shape or list(SHAPES), options.dtype or list(DTYPES)
    if options.measure:
        platform.start(threads=options.threads)
        print(json.dumps(measure(options.measure, shapes[0], dtypes[0], options.vocab)))
        return
    results = []
    for shape in shapes:
        for dtype in dtypes:
            fused, plain = (measure_apart(side, shape, dtype, options.vocab, options.threads) for side in SIDES)
            logits = B * S * options.vocab * DTYPES[dtype].itemsize / 1e6
            saved = plain["mb"] - fused["mb"]
            print(
                f"{shape:6} {dtype}: a step adds {fused['mb']:.0f} MB, {plain['mb']:.0f} MB with all logits;"
                f" saved {saved:.0f} MB, {saved / logits:.1f}x the logits' {logits:.0f} MB;"
                f" {fused['step_s']:.2f} s, {plain['step_s']:.2f} s; loss {fused['loss']:.5f}, {plain['loss']:.5f}",
                flush=True,
            )
            results.append(
                {
                    "shape": shape,
                    "dtype": dtype,
                    "fused": fused,
                    "unfused": plain,
                    "logits_mb": logits,
                    "saved_mb": saved,
                }
            )
    if options.out:
        about = {"torch": torch.__version__, "tokens": B * S, "vocab": options.vocab, "results": results}
        options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
