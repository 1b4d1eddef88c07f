"""Mid-training and RL in minutes on two CPU cores: `make demo`.

Builds a corpus of real text, mid-trains a small hybrid on two tensor-parallel ranks, stops it half-way with a signal,
goes on from the checkpoint on two data-parallel ranks, draws the curves, exports the model to Hugging Face's format,
checks it against transformers, lets transformers write with it, and starts a run from it. Then RL on sums: of this
model, of one that was mid-trained without a worked sum, and of one that was not mid-trained at all, drawn into one
picture: the paper's claim in miniature. Each step is a command that is printed and can be run by hand.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from prism_mcore.config import load
from prism_mcore.console import console as open_console
from prism_mcore.console import plain
from prism_mcore.rl.curves import HELD_OUT, plot_held_out
from prism_mcore.train.curves import plot_run, read_records
from prism_mcore.train.metrics import STEPS_FILE, VALIDATION_FILE
from prism_mcore.train.settings import MidtrainSettings

RUN = Path("runs/demo")
HF = RUN / "hf"
RECIPE = "launch/recipes/demo.yaml"
DOMAINS = ("general", "code", "math", "science", "sums", "sums-bare")
PROMPTS = ("sums-prompts", "sums-held-out")
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
TRAIN = [*TWO_RANKS, "launch/midtrain.py", "--recipe", RECIPE]
# label -> run, settings of its RL. Nothing is to be expected of the last two: they get fewer steps.
RL_RUNS = {
    "mid-trained": ("demo-rl", []),
    "mid-trained without worked sums": ("demo-rl-bare", ["model.init=runs/demo-bare", "train.steps=20"]),
    "not mid-trained": ("demo-rl-random", ["model.init=random", "train.steps=20"]),
}
PICTURE = RUN / "rl.png"

console = open_console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="go on with an earlier demo run instead of starting anew")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same demo everywhere: two ranks do not fit on a single GPU
    begun = time.monotonic()
    make_corpus()
    settings = load(MidtrainSettings, RECIPE)
    if not arguments.keep:
        remove_run()
    half = settings.train.steps // 2
    console.rule(f"2. mid-training, to be stopped after half of {settings.train.steps} steps")
    stopped = train(stop_at=half)
    console.rule(f"3. it goes on from step {stopped}, on two data-parallel ranks: checkpoints know no layout")
    train(["parallel.tp=1", "parallel.sequence_parallel=false"])
    console.rule("4. what it learnt")
    report(stopped, settings.train.steps)
    curves = plot_run(RUN, {"resumed": stopped})
    console.rule("5. to Hugging Face, and back")
    exchange()
    learnt = time.monotonic()
    console.rule("6. RL on sums: with and without what mid-training gave")
    call([*TWO_RANKS, "launch/midtrain.py", "--recipe", "launch/recipes/demo-bare.yaml"])
    reinforce()
    console.print(
        f"{(time.monotonic() - begun) / 60:.1f} minutes, {(time.monotonic() - learnt) / 60:.1f} of them for RL."
        f" Pictures: {curves}, {PICTURE}"
    )


def make_corpus() -> None:
    """Real text of several domains, its token files, and prompts, unless an earlier demo left them."""
    console.rule("1. a corpus of real text, from what is on this machine")
    corpus = RUN / "corpus"
    if not all((corpus / f"{name}.jsonl").is_file() for name in DOMAINS + PROMPTS):
        call([sys.executable, "tools/make_demo_corpus.py", "--out", str(corpus)])
    if not all((corpus / f"{domain}.idx").is_file() for domain in DOMAINS):
        files = [str(corpus / f"{domain}.jsonl") for domain in DOMAINS]
        tokenizer = ["--train-bpe", "1024", "--tokenizer", str(RUN / "tokenizer")]
        call([sys.executable, "tools/tokenize_corpus.py", *files, "--out", str(corpus), "--per-file", *tokenizer])


def remove_run() -> None:
    """Everything of an earlier demo but its corpus and tokenizer."""
    for path in RUN.iterdir():
        if path.name not in ("corpus", "tokenizer"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("demo-bare", *(name for name, _ in RL_RUNS.values())):
        shutil.rmtree(RUN.parent / name, ignore_errors=True)


def call(command: list[str]) -> None:
    """Show and run a command; end the demo where it fails."""
    show(command)
    subprocess.run(command, check=True)


def show(command: list[str]) -> None:
    console.print("$ " + shlex.join([Path(command[0]).name, *command[1:]]), style="bold")


def exchange() -> None:
    """Export, compare with transformers, write some text with transformers, and start a run from the export."""
    tool = [sys.executable, "tools/convert_checkpoint.py", "to-hf", str(RUN), str(HF)]
    call([*tool, "--tokenizer", str(RUN / "tokenizer"), "--verify"])
    call([sys.executable, "tools/verify_hf.py", str(HF)])
    write_text("User: How many neutrons are in a nucleus of lanthanum-128?\nAssistant:")
    settings = [
        f"model.init={HF}",
        "run.name=demo-from-hf",
        "train.steps=20",
        "optimizer.lr=3e-4",
        "checkpoint.resume=false",
    ]
    call([*TRAIN, *settings])


def reinforce() -> None:
    """RL of the three models, and their held-out correctness in a table and a picture."""
    runs = {}
    for label, (name, settings) in RL_RUNS.items():
        call([*TWO_RANKS, "launch/rl.py", "--recipe", "launch/recipes/demo-rl.yaml", f"run.name={name}", *settings])
        runs[label] = RUN.parent / name
    table = Table("model", "before RL", "after", "steps", title="held-out sums answered in the format, share right")
    for label, folder in runs.items():
        first, *_, last = read_records(folder / VALIDATION_FILE)
        correct = (f"{record[HELD_OUT]:.3f}" for record in (first, last))
        table.add_row(label, *correct, str(last["step"]))
    console.print(table)
    plot_held_out(runs, PICTURE)


def write_text(prompt: str) -> None:
    """A continuation by transformers, greedy, from the exported directory alone."""
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(HF)
    model = transformers.AutoModelForCausalLM.from_pretrained(HF)
    tokens = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=60, do_sample=False)
    console.print("transformers writes:", style="bold")
    console.print(plain(tokenizer.decode(written[0], skip_special_tokens=True)))


def train(settings: Sequence[str] = (), stop_at: int | None = None) -> int:
    """Run the training command, with a SIGTERM after `stop_at` steps; returns the step it ended at."""
    command = [*TRAIN, *settings]
    show(command)
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}  # else torchrun sets 1, and says so
    process = subprocess.Popen(
        command, env=threads | os.environ, stderr=subprocess.PIPE if stop_at else None, text=True
    )
    if stop_at:
        threading.Thread(target=print_until_stopped, args=[process], daemon=True).start()
    while stop_at and process.poll() is None and last_step() < stop_at:
        time.sleep(0.2)
    if process.poll() is None and stop_at:
        console.print(f"kill -TERM {process.pid} after step {last_step()}", style="bold")
        process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code and not stop_at:
        sys.exit(code)
    return last_step()


def print_until_stopped(process: subprocess.Popen[str]) -> None:
    """The run's own lines; what follows is torchrun's long report of the signal it was sent."""
    assert process.stderr is not None
    stopped = False
    for line in process.stderr:
        if not stopped and "torch/distributed" not in line:
            print(line, end="", file=sys.stderr, flush=True)
        stopped |= line.startswith("stopped by a signal")


def last_step() -> int:
    """Steps in the run's metrics so far."""
    records = read_records(RUN / STEPS_FILE)
    return records[-1]["step"] if records else 0


def report(stopped: int, steps: int) -> None:
    """Validation loss by domain, before and after, and proof that no step is missing or double."""
    validations = read_records(RUN / VALIDATION_FILE)
    first, last = validations[0], validations[-1]
    table = Table("domain", "before", "after", title="held-out loss, nats per token")
    for key in (key for key in first if key != "step"):
        table.add_row(key.rsplit("/", 1)[1], f"{first[key]:.3f}", f"{last[key]:.3f}")
    console.print(table)
    taken = [record["step"] for record in read_records(RUN / STEPS_FILE)]
    if taken != list(range(1, steps + 1)):
        sys.exit(f"{RUN / STEPS_FILE} does not have each of the {steps} steps once")
    console.print(f"all {steps} steps taken once; stopped and resumed after step {stopped}")


if __name__ == "__main__":
    main()
