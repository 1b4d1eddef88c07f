"""SHA-256 of what the engine computes, to show that a change of its code changed no number.

    python tools/fingerprint.py --out before.json         # here, before the change
    python tools/fingerprint.py --compare before.json     # after it: prints what differs; then exit code 1

The demo's corpus is tokenised; its hybrid is mid-trained for 50 steps on two tensor-parallel ranks, exported, improved
by RL for 5 steps on two data-parallel ranks, imported again, scored and sampled from. Of records, fields that depend on
nothing but the numbers are hashed, not times or speeds. Takes some two minutes on two CPU cores; the same machine and
versions give the same numbers.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
DOMAINS = ("general", "code", "math", "science", "sums")
COMPUTED = re.compile(
    r"^(step|loss|grad_norm|lr|tokens|entropy|kl|clip|ratio_max|importance|reward|rewards|groups|rollout|rl|validation"
    r"|prompt|response|answer|advantage|finish|sample|mean_logprob)(/|$)"
)
STEPS, RL_STEPS = 50, 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the hashes as JSON")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="hashes to compare with")
    arguments = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        found = fingerprints(Path(folder))
    for name, value in found.items():
        print(f"{value[:16]}  {name}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return compare(json.loads(arguments.compare.read_text(encoding="utf-8")), found) if arguments.compare else 0


def fingerprints(work: Path) -> dict[str, str]:
    """Name -> hash of everything that the commands write."""
    make_corpus(work)
    sources = ", ".join(
        f"{{path: {work}/{name}, weight: {0.7 if name == 'sums' else 0.075}, domain: {name}}}" for name in DOMAINS
    )
    run, rl, hf, imported = work / "midtrain", work / "rl", work / "hf", work / "imported"
    common = [f"run.dir={work}", "log.tensorboard=false"]
    call(
        *TWO_RANKS, "launch/midtrain.py", "--recipe", "launch/recipes/demo.yaml", *common, "run.name=midtrain",
        f"train.steps={STEPS}", "train.validate_every=25", f"data.sources=[{sources}]",
    )  # fmt: skip
    call(
        *TWO_RANKS, "launch/rl.py", "--recipe", "launch/recipes/demo-rl.yaml", *common, "run.name=rl",
        f"model.init={run}", f"rl.tokenizer={work}/tokenizer", f"train.steps={RL_STEPS}", "train.validate_every=5",
        f"rl.prompts=[{{path: {work}/sums-prompts.jsonl, name: sums}}]", "rl.kl_coefficient=0.01",
        f"rl.held_out=[{{path: {work}/sums-held-out.jsonl, name: sums}}]", "rl.drop_zero_spread=false",
    )  # fmt: skip
    convert = [sys.executable, "tools/convert_checkpoint.py"]
    call(*convert, "to-hf", run, hf, "--tokenizer", work / "tokenizer")
    call(*convert, "from-hf", hf, imported, "--tp", "2")
    tokens, prompts = work / "tokens.json", work / "prompts.jsonl"
    tokens.write_text(json.dumps([[(7 * row + 3 * place) % 1000 for place in range(40)] for row in range(6)]))
    shutil.copyfile(work / "sums-held-out.jsonl", prompts)
    call(
        *TWO_RANKS, "launch/score.py", "--hf", hf, "--tokens", tokens, "--out", work / "scores.safetensors",
        "--logits", "parallel.tp=2", "precision.dtype=fp32",
    )  # fmt: skip
    call(
        *TWO_RANKS, "launch/generate.py", "--hf", hf, "--prompts", prompts, "--out", work / "samples.jsonl",
        "sampling.samples=2", "sampling.max_tokens=24", "precision.dtype=fp32",
    )  # fmt: skip
    found = {
        f"tokens/{name}": digest(work / name) for name in (f"{d}.{end}" for d in DOMAINS for end in ("bin", "idx"))
    }
    for folder in (run, rl):
        found |= {f"{folder.name}/{name}": records(folder / f"{name}.jsonl") for name in ("metrics", "validation")}
    found |= {f"rl/{path.stem}": records(path) for path in sorted((rl / "rollouts").glob("*.jsonl"))}
    found |= {f"export/{path.name}": digest(path) for path in sorted(hf.iterdir()) if path.suffix == ".safetensors"}
    found["import"] = digests(path for path in sorted(imported.rglob("*.safetensors")))
    found["scores"] = digest(work / "scores.safetensors")
    found["samples"] = lines(work / "samples.jsonl")
    return found


def make_corpus(work: Path) -> None:
    call(sys.executable, "tools/make_demo_corpus.py", "--out", work)
    call(
        sys.executable, "tools/tokenize_corpus.py", *(work / f"{name}.jsonl" for name in DOMAINS), "--out", work,
        "--per-file", "--train-bpe", "1024", "--tokenizer", work / "tokenizer",
    )  # fmt: skip


def call(*command: object) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(paths) -> str:
    return hashlib.sha256("".join(path.name + digest(path) for path in paths).encode()).hexdigest()


def records(path: Path) -> str:
    """Of a .jsonl file without what was measured or is newer."""
    kept = [
        {name: value for name, value in json.loads(line).items() if COMPUTED.match(name)}
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def lines(path: Path) -> str:
    """Of a .jsonl file whose lines come in any order."""
    return hashlib.sha256("\n".join(sorted(path.read_text(encoding="utf-8").splitlines())).encode()).hexdigest()


def compare(before: dict[str, str], now: dict[str, str]) -> int:
    differ = [name for name in before | now if before.get(name) != now.get(name)]
    for name in differ:
        print(f"differs: {name}", file=sys.stderr)
    print(f"{len(before | now) - len(differ)} of {len(before | now)} are the same")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
