"""lm_eval's requests beside lm_eval's own HF model at its best batch size: the same model, requests and one thread.

    python benchmarks/evaluate.py [--shape dense|hybrid ...] [--repeats 3]

about 10 million parameters, fp32. Needs lm_eval with its HF model (pip install 'prism_mcore[lm-eval]' accelerate).

scores     500 log-likelihoods of 110 tokens: contexts of 100, all different, and continuations of 10.
choices    125 contexts of 100 tokens with 4 continuations of 10 each, as multiple choice has them.
texts      100 greedy generations of 64 tokens, after prompts of 46.
start      a fresh process until it has answered one log-likelihood: imports, loading and all.

Sides take turns, each run in a process of its own; CPU times (of all threads) are compared by their minima. Prefill and
tokenizing are included, loading is not, but for `start`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import process_time

RESULTS = Path(__file__).parent / "results" / "evaluate.json"
BATCHES = {"scores": (4, 16, 64), "choices": (4, 16, 64), "texts": (10, 25, 50, 100)}
TARGETS = {
    ("scores", "dense"): 2.0,
    ("scores", "hybrid"): 2.5,
    ("texts", "dense"): 2.5,
    ("texts", "hybrid"): 3.5,
}
CONTEXT, CONTINUATION, PROMPT, NEW = 100, 10, 46, 64


def make_model(shape: str, folder: Path) -> None:
    """A random model and a tokenizer of as many words as it has tokens."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from training_step import SHAPES

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**SHAPES[shape])
    config.eos_token_id, config.bos_token_id = config.vocab_size - 1, None
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {f"w{n}": n for n in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = f"w{config.vocab_size - 1}"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    fast.save_pretrained(folder)


def requests(work: str) -> list:
    import numpy as np
    from lm_eval.api.instance import Instance

    random = np.random.default_rng(0)

    def text(count: int) -> str:
        return " ".join(f"w{n}" for n in random.integers(0, 8000, count))

    if work == "texts":
        how = {"until": [], "max_gen_toks": NEW, "do_sample": False}
        return [Instance("generate_until", {}, (text(PROMPT), how), n) for n in range(100)]
    contexts = [text(CONTEXT) for _ in range(500)] if work != "choices" else [text(CONTEXT) for _ in range(125)] * 4
    return [Instance("loglikelihood", {}, (c, " " + text(CONTINUATION)), n) for n, c in enumerate(contexts)]


def load(side: str, folder: Path, batch: int):
    """An lm_eval model of either side, on one thread."""
    if side == "theirs":
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(1)
        return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch)
    from prism_mcore import platform, program

    program.begin(resumes=False)  # as the launcher does: megatron-core then leaves out torch's compiler
    from prism_mcore.convert.online import model_from_hf
    from prism_mcore.evaluate.harness import EngineLM
    from prism_mcore.evaluate.settings import EvaluateSettings
    from prism_mcore.generate.engine import Engine
    from prism_mcore.meeting import Meeting
    from prism_mcore.parallel import init_groups
    from prism_mcore.text import load_tokenizer, read_eos

    device = platform.start(threads=1)
    settings = EvaluateSettings(precision={"dtype": "fp32"}, generate={"cache_gb": 2})  # type: ignore[arg-type]
    groups = init_groups(settings.parallel)
    (model,) = model_from_hf(folder, settings, groups, device)
    tokenizer = load_tokenizer(folder)
    engine = Engine(model, tokenizer, settings=settings.generate, eos=read_eos(folder))
    return EngineLM(engine, tokenizer, groups, Meeting.of_all_ranks(settings.parallel.timeout))


def run(side: str, folder: Path, work: str, batch: int) -> dict:
    """CPU seconds of one side, and what it answered."""
    lm = load(side, folder, batch)
    asked = requests("scores" if work == "start" else work)
    if work == "start":
        return {"answers": lm.loglikelihood(asked[:1])}
    answer = lm.generate_until if work == "texts" else lm.loglikelihood
    answer(asked[:2])
    begun = process_time()
    answers = answer(asked)
    return {"cpu_s": process_time() - begun, "answers": answers}


def measure(side: str, folder: Path, work: str, batch: int) -> dict:
    """One run in a process of its own."""
    import os

    command = [sys.executable, __file__, "--side", side, "--model", str(folder), "--work", work, "--batch", str(batch)]
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    before = children_s()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {"process_s": children_s() - before} | json.loads(done.stdout.splitlines()[-1])


def children_s() -> float:
    """CPU seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(shape: str, folder: Path, work: str, repeats: int) -> dict:
    """Their batch sizes once each, then the best of them and ours in turns."""
    if work == "start":
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for side, runs in times.items():
                runs.append(measure(side, folder, work, 1)["process_s"])
        best = {side: min(runs) for side, runs in times.items()}
        return {"shape": shape, "work": work, "runs": times, "s": best, "speedup": best["theirs"] / best["ours"]}
    batches = {batch: measure("theirs", folder, work, batch)["cpu_s"] for batch in BATCHES[work]}
    batch = min(batches, key=lambda size: batches[size])
    found: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        for side, each in found.items():
            each.append(measure(side, folder, work, batch))
    best = {side: min(one["cpu_s"] for one in each) for side, each in found.items()}
    return {
        "shape": shape,
        "work": work,
        "their_batches": batches,
        "runs": {side: [one["cpu_s"] for one in each] for side, each in found.items()},
        "s": best,
        "speedup": best["theirs"] / best["ours"],
        "target": TARGETS.get((work, shape)),
        "answers": agreement(found["ours"][0]["answers"], found["theirs"][0]["answers"]),
    }


def agreement(ours: list, theirs: list) -> str:
    if isinstance(ours[0], str):
        return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(ours)} texts equal"
    return f"largest difference {max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=["dense", "hybrid"], default=["dense", "hybrid"])
    parser.add_argument("--works", nargs="+", choices=[*BATCHES, "start"], default=[*BATCHES, "start"])
    parser.add_argument("--repeats", type=int, default=3)
    for hidden in ("--side", "--model", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run(arguments.side, Path(arguments.model), arguments.work, arguments.batch)))
        return
    from prism_mcore.console import say, show
    from prism_mcore.plan import report

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shape:
            make_model(shape, Path(folder) / shape)
            for work in arguments.works:
                rows.append(compare(shape, Path(folder) / shape, work, arguments.repeats))
                say(f"{shape} {work}: {rows[-1]['s']}, {rows[-1].get('answers', '')}", stderr=True)
    table = [
        (f"{row['shape']} {row['work']}", *(f"{row['s'][side]:.2f}" for side in ("ours", "theirs")),
         f"{row['speedup']:.2f}x", f"{row['target']}x" if row.get("target") else "")
        for row in rows
    ]  # fmt: skip
    show(report.numbers("CPU s", ("", "ours", "lm_eval's HF model", "speedup", "target"), table))
    earlier = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    done = {(row["shape"], row["work"]) for row in rows}
    rows = [row for row in earlier if (row["shape"], row["work"]) not in done] + rows
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
