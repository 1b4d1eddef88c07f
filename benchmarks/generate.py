"""Generation beside transformers' batched `generate`: the same shape, prompts, samples and stop tokens, on one thread.

    python benchmarks/generate.py [--shape dense|hybrid ...] [--lengths equal|ragged ...] [--repeats 3] [--exact]

8 prompts of 64 tokens x 16 samples at temperature 1, about 10 million parameters, fp32. Every run is a process of its
own with one thread; sides take turns, CPU times (of all threads) are compared by their medians. Prefill is included.

equal   every response has 256 tokens.
ragged  a response ends with one of 98 of the 8,192 tokens or after 256: 80 tokens on average for weights as drawn. A
        finished row leaves our batch, and stays in theirs until the last one is done.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import process_time

RESULTS = Path(__file__).parent / "results" / "generate.json"
PROMPTS, SAMPLES, PROMPT_LEN, NEW = 8, 16, 64, 256
NUM_STOP = 98  # of 8,192 nearly equal tokens: min(geometric, 256) has a mean of 80
TARGETS = {("dense", "equal"): 2.5, ("hybrid", "equal"): 2.0, ("dense", "ragged"): 4.0, ("hybrid", "ragged"): 4.0}


def ours(shape: str, new: int, stop: list[int], exact: bool) -> dict:
    import torch
    from training_step import SHAPES

    from prism_kernels.table import OPS
    from prism_mcore import platform
    from prism_mcore.generate import Engine, EngineSettings, Request, Sampling
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.model.spec import spec_from_config
    from prism_mcore.parallel import ParallelSettings, init_groups

    device = platform.start(threads=1)
    spec = spec_from_config(SHAPES[shape])
    ops = Ops({name: "exact" for name, op in OPS.items() if exact and "exact" in op.backends}, device)
    layers = [list(range(len(spec.pattern)))]
    (model,) = build_chunks(spec, layers, init_groups(ParallelSettings()), ops, dtype=torch.float32, device=device)
    model.initialise(0)
    engine = Engine(model, settings=EngineSettings(slots=PROMPTS * SAMPLES, cache_gb=4))
    requests = [
        Request(tuple(prompt), tuple((0, 0, i, sample) for sample in range(SAMPLES)))
        for i, prompt in enumerate(prompts(spec.vocab_size))
    ]

    def run(max_tokens: int) -> int:
        return sum(len(c.tokens) for c in engine.stream(requests, Sampling(max_tokens=max_tokens, stop_ids=stop)))

    run(4)
    return timed(lambda: run(new))


def theirs(shape: str, new: int, stop: list[int], exact: bool) -> dict:
    import torch
    import transformers
    from training_step import SHAPES

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**SHAPES[shape])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    tokens = torch.tensor(prompts(config.vocab_size)).repeat_interleave(SAMPLES, 0)
    pad = config.vocab_size - 1

    @torch.inference_mode()
    def run(max_tokens: int) -> int:
        least = 0 if stop else max_tokens
        out = model.generate(
            tokens, max_new_tokens=max_tokens, min_new_tokens=least, do_sample=True, temperature=1.0, top_k=0,
            eos_token_id=stop or None, pad_token_id=pad,
        )[:, tokens.shape[1] :]  # fmt: skip
        ends = torch.isin(out, torch.tensor(stop)).int() if stop else torch.zeros_like(out)
        return int((ends.cumsum(1) - ends == 0).sum())

    run(4)
    return timed(lambda: run(new))


def prompts(vocabulary: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (PROMPTS, PROMPT_LEN)).tolist()


def timed(run) -> dict:
    started = process_time()
    tokens = run()
    return {"cpu_s": process_time() - started, "tokens": tokens}


def measure(side: str, shape: str, lengths: str, new: int) -> dict:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--shape", shape, "--lengths", lengths, "--new", str(new)]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, lengths: str, sides: list[str], repeats: int, new: int) -> dict:
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            runs[side].append(measure(side, shape, lengths, new))
    medians = {side: statistics.median(run["cpu_s"] for run in runs[side]) for side in sides}
    row = {"shape": shape, "lengths": lengths, "target": TARGETS[shape, lengths], "runs": runs, "cpu_s": medians}
    row["speedup"] = medians["theirs"] / medians["ours"]
    if "exact" in medians:
        row["exact_cost"] = medians["exact"] / medians["ours"]
    return row


def show(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "shape", "lengths", "transformers, CPU s", "ours, CPU s", "tokens/s", "speedup", "target", "exact costs"
    )
    for row in rows:
        tokens = statistics.median(run["tokens"] for run in row["runs"]["ours"])
        ours_s = row["cpu_s"]["ours"]
        exact = f"{row['exact_cost']:.2f}x" if "exact_cost" in row else "-"
        table.add_row(
            row["shape"], row["lengths"], f"{row['cpu_s']['theirs']:.1f}", f"{ours_s:.1f}", f"{tokens / ours_s:,.0f}",
            f"{row['speedup']:.2f}x", f"{row['target']}x", exact,
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=["dense", "hybrid"], default=["dense", "hybrid"])
    parser.add_argument("--lengths", nargs="+", choices=["equal", "ragged"], default=["equal", "ragged"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new", type=int, default=NEW, help="longest response, in tokens")
    parser.add_argument("--exact", action="store_true", help="measure exact mode, too")
    parser.add_argument("--side", choices=["ours", "exact", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        shape, lengths = arguments.shape[0], arguments.lengths[0]
        side = theirs if arguments.side == "theirs" else ours
        stop = list(range(NUM_STOP)) if lengths == "ragged" else []
        print(json.dumps(side(shape, arguments.new, stop, arguments.side == "exact")))
        return
    sides = ["ours", "theirs"] + ["exact"] * arguments.exact
    rows = [
        compare(shape, lengths, sides, arguments.repeats, arguments.new)
        for shape in arguments.shape
        for lengths in arguments.lengths
    ]
    show(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
