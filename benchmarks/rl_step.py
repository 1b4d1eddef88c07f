"""What an RL step is made of, and what it needs beyond a training step of the same tokens.

    python benchmarks/rl_step.py [--shape dense|hybrid] [--parity tolerance|exact] [--reward math|code] [--repeat 3]
                                 [--out FILE]

8 prompts x 16 samples on models of about 10 million parameters, fp32, one thread, one process per case. Times are CPU
seconds of that process, medians over the steps, so that other programs do not count, nor do verifiers, which are
processes of their own. Overhead is whatever is not generation, rewards, reference, policy or update: gathering,
packing, logging, writing the rollouts. Verification is the share of the step's wall time that is spent waiting for
verdicts once the last response is there; random weights write no answers, so the one verifier is given a right one in
place of each text. All responses are equally long, which is its worst case: none is verified while others are still
generated. Memory is the high-water mark of the resident set above what was there when model, optimizer and reference
were built; the training step is mid-training's, in a process of its own, on as many tokens in as large packs.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from training_step import SHAPES, VOCAB

from prism_mcore import platform
from prism_mcore.batch import PackedBatch
from prism_mcore.model.settings import resolve_spec
from prism_mcore.parallel import init_groups
from prism_mcore.rl.prompts import open_prompts
from prism_mcore.rl.settings import RLSettings
from prism_mcore.train.metrics import StepClock

PROMPTS, SAMPLES, PROMPT_WORDS = 8, 16, 60
PARTS = ("generation", "rewards", "reference", "policy", "update")
_ADD = [{"args": [[i, 2 * i, 3 * i]], "expected": 6 * i} for i in range(3)]
ANSWERS: dict[str, tuple[dict[str, Any], str]] = {  # reward: what a prompt's record has, and a response that is right
    "math": ({"answer": r"\frac{355}{113}"}, r"<think></think> \boxed{\frac{710}{226}}"),
    "code": (
        {"tests": {"type": "function", "name": "total", "cases": _ADD}},
        "<think></think>\n```python\ndef total(numbers):\n    return sum(numbers)\n```",
    ),
}


class Clocks(StepClock):
    """CPU seconds of this process, and the wall's beside them."""

    def __init__(self) -> None:
        self.wall = StepClock()
        super().__init__(time.process_time)

    def start(self) -> None:
        super().start()
        self.wall.start()

    def mark(self, part: str) -> None:
        super().mark(part)
        self.wall.mark(part)


def settings(folder: Path, shape: str, parity: str, reward: str, new_tokens: int) -> RLSettings:
    """An RL run on random prompts, its tokenizer and its model's shape, written into a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    lines = [
        {"prompt": " ".join(f"w{(97 * i + 31 * j) % 8000}" for j in range(PROMPT_WORDS)), "reward": reward}
        for i in range(4 * PROMPTS)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line | ANSWERS[reward][0]) + "\n" for line in lines))
    (folder / "model.json").write_text(json.dumps(SHAPES[shape]))
    context = PROMPT_WORDS + 4 + new_tokens
    return RLSettings.model_validate(
        {
            "run": {"name": "run", "dir": str(folder)},
            "model": {"spec": str(folder / "model.json")},
            "rl": {
                "prompts": [{"path": str(folder / "prompts.jsonl")}],
                "tokenizer": str(folder),
                "context": context,
                "prompts_per_step": PROMPTS,
                "parity": parity,
                "show": 0,
            },
            "rewards": {"workers": 1},
            "sampling": {"samples": SAMPLES, "max_tokens": new_tokens, "ignore_eos": True},
            "generate": {"cache_gb": 1.0},
            "train": {"steps": 1000, "micro_batch": 2048 // context + 1},
            "precision": {"dtype": "fp32"},
            "log": {"tensorboard": False, "every": 1000},
        }
    )


def measure(shape: str, parity: str, reward: str, new_tokens: int, repeat: int, training: bool) -> dict[str, Any]:
    """One case, in this process: RL steps, or only the memory of training ones."""
    from prism_mcore.rl import loop
    from prism_mcore.rl.metrics import RLMetrics

    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        wanted = settings(Path(folder), shape, parity, reward, new_tokens)
        prompts = open_prompts(wanted, resolve_spec(wanted.model))
        groups = init_groups(wanted.parallel)
        run = loop.build(wanted, prompts, groups, torch.device("cpu"), opened)
        run.rollouts.clock = clock = Clocks()
        run.rollouts.text = lambda tokens, stop_token: ANSWERS[reward][1]  # type: ignore[method-assign]
        metrics = opened.enter_context(RLMetrics(run, 0, clock))
        steps, waited = [], []
        mark = HighWater()
        if training:
            train_like(run)
            return {"training_mb": mark.added_mb()}
        for step in range(1, repeat + 2):
            clock.start()
            made = loop.training_rollouts(run, step)
            updates = loop.update_policy(run, step, made, 1e-6)
            assert all(rollout.rewards["correct"] == 1.0 for group in made for rollout in group.rollouts)
            waited.append(clock.wall.parts["time/rewards_s"] / clock.wall.step_s)
            metrics.log(step, made, updates, 1e-6, run.tokens)
            steps.append((clock.step_s, dict(clock.parts)))
        steps = steps[1:]  # one to warm up
        total = statistics.median(total for total, _ in steps)
        parts = {part: statistics.median(p.get(f"time/{part}_s", 0.0) for _, p in steps) for part in PARTS}
        overhead = statistics.median(1 - sum(p.get(f"time/{part}_s", 0.0) for part in PARTS) / t for t, p in steps)
        return {
            "shape": shape,
            "parity": parity,
            "reward": reward,
            "tokens": PROMPTS * SAMPLES * new_tokens,
            "step_s": total,
            "parts_s": parts,
            "overhead_share": overhead,
            "verification_share": statistics.median(waited[1:]),
            "gap_max": updates[-1].gap.size,
            "rl_mb": mark.added_mb(),
            "cache_mb": run.rollouts.engine.statistics.cache_bytes / 1e6,
        }


def train_like(run: Any) -> None:
    """Two mid-training steps, updates included, on as many tokens as the rollouts have, in packs of the same size."""
    from prism_mcore.train.optimizer import update
    from prism_mcore.train.step import backward

    context = run.settings.rl.context
    rows = run.settings.train.micro_batch
    b = rows * context
    tokens = torch.randint(VOCAB, (1, b), generator=torch.Generator().manual_seed(0))
    batch = PackedBatch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        loss_mask=torch.ones(1, b, dtype=torch.bool),
        position_ids=torch.arange(context).repeat(rows)[None],
        seq_idx=torch.arange(rows, dtype=torch.int32).repeat_interleave(context)[None],
        cu_seqlens=torch.arange(0, b + 1, context, dtype=torch.int32),
        max_seqlen=context,
        num_tokens=b,
        source_ids=torch.zeros(1, dtype=torch.int32),
        sample_ids=torch.zeros(1, dtype=torch.int64),
    )
    micro_batches = -(-PROMPTS * SAMPLES // rows)
    for _ in range(2):
        stats = backward(run.chunks, run.optimizer, [batch] * micro_batches, run.groups, num_sources=1)
        update(run.optimizer, stats.grad_norm, 1e-6)


class HighWater:
    """The most resident memory from here on, above what is resident now."""

    def __init__(self) -> None:
        gc.collect()
        self.before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")

    def added_mb(self) -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return (int(status["VmHWM"].split()[0]) * 1024 - self.before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: both")
    parser.add_argument("--parity", choices=["tolerance", "exact"], action="append", help="default: both")
    parser.add_argument("--reward", choices=ANSWERS, default="math", help="default: math")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each response (default 64)")
    parser.add_argument("--repeat", type=int, default=3, help="measured steps (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--one", choices=["rl", "training"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes, parities = arguments.shape or list(SHAPES), arguments.parity or ["tolerance", "exact"]
    if arguments.one:
        platform.start(threads=1)
        case = shapes[0], parities[0], arguments.reward, arguments.new_tokens, arguments.repeat
        print(json.dumps(measure(*case, training=arguments.one == "training")))
        return
    results = []
    for shape in shapes:
        for parity in parities:
            result: dict[str, Any] = {}
            for one in ("rl", "training"):
                which = ["--one", one, "--shape", shape, "--parity", parity, "--reward", arguments.reward]
                numbers = ["--new-tokens", str(arguments.new_tokens), "--repeat", str(arguments.repeat)]
                done = subprocess.run([sys.executable, __file__, *which, *numbers], check=True, stdout=subprocess.PIPE)
                result |= json.loads(done.stdout.splitlines()[-1])
            results.append(result)
            listed = ", ".join(f"{part} {seconds:.2f}" for part, seconds in result["parts_s"].items())
            print(
                f"{shape:6} {parity:9}: {result['step_s']:.2f} s = {listed}, overhead {result['overhead_share']:.1%},"
                f" verification {result['verification_share']:.1%} of wall time;"
                f" largest gap {result['gap_max']:.2g}; memory +{result['rl_mb']:.0f} MB, training step"
                f" +{result['training_mb']:.0f} MB, caches {result['cache_mb']:.0f} MB",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
