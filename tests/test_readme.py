"""Every command and the Python of README.md run as they stand there, on a tiny model and fewer ranks; its links lead
somewhere."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny.hf_models import save_hf
from tiny.prompt_files import write_prompts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = ["precision.dtype=fp32", "log.tensorboard=false"]
TRAIN = [
    "data.seq_len=16",
    "train.steps=2",
    "train.global_batch=4",
    "optimizer.warmup_steps=0",
    "guards.spike_threshold=0",
]
RL = ["rl.context=24", "rl.prompts_per_step=2", "sampling.samples=2", "sampling.max_tokens=8", "train.steps=1"]
# Program -> what a tiny run adds to the README's command.
ADDED: dict[str, list[str]] = {
    "tools/tokenize_corpus.py": [],
    "launch/midtrain.py": [*TINY, *TRAIN, "data.validation_fraction=0"],
    "tools/convert_checkpoint.py": [],
    "tools/verify_hf.py": [],
    "launch/rl.py": [*TINY, *RL, "rewards.require_think=false", "rewards.workers=1"],
    "launch/generate.py": ["precision.dtype=fp32", "sampling.max_tokens=4"],
    "launch/score.py": ["precision.dtype=fp32"],
    "launch/evaluate.py": ["precision.dtype=fp32", "sampling.max_tokens=4", "grading.workers=1"],
    "tools/plot_run.py": [],
    "tools/doctor.py": [],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "make "))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: this repository's programs, a model, a corpus, prompts, and sequences to score."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("launch", "tools"):
        (folder / name).symlink_to(ROOT / name)
    model = folder / "models" / "llama-3.1-8b"
    save_hf("llama-3.1", model, max_position_embeddings=256)
    write_prompts(model)
    prompts = (model / "prompts.jsonl").read_text()
    for path in model.glob("*.jsonl"):
        path.unlink()
    (folder / "prompts.jsonl").write_text(prompts)
    corpus = folder / "corpus" / "math"
    corpus.mkdir(parents=True)
    lines = [json.dumps({"text": " ".join(f"w{(i * j) % 47}" for j in range(30))}) + "\n" for i in range(40)]
    (corpus / "a.jsonl").write_text("".join(lines))
    (folder / "tokens.json").write_text(json.dumps([[5, 6, 7, 8], [9, 3, 4, 2]]))
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_every_command_runs_in_its_order(folder):
    for command in commands():
        words = shlex.split(command.replace("--nproc_per_node 8", "--nproc_per_node 2"))
        (program,) = [word for word in words if word in ADDED]
        words = [match for word in words for match in (sorted(map(str, folder.glob(word))) if "*" in word else [word])]
        done = run([*words, *ADDED[program]], folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (folder / "runs/midtrain-8-gpus/curves.png").stat().st_size > 10_000
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 7


def test_the_python_example_runs(folder):
    (code,) = blocks("python")
    done = run([sys.executable, "-c", code.replace("models/llama-math", "models/llama-3.1-8b")], folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("["), done.stdout


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "launch/README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    file = ROOT / page if (ROOT / page).is_file() else ROOT / "docs" / page
    text = file.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("http")]
    missing = [target for target in targets if not (file.parent / target).exists()]
    assert not missing
