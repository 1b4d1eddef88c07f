"""`prism_mcore.load_model`: what the README shows runs, without torchrun, from every kind of folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny.hf_models import save_hf
from tiny.prompt_files import write_prompts

ROOT = Path(__file__).parent.parent
IMPORTS = """
import json, prism_mcore
from prism_mcore.generate import Engine

def show(model, tokenizer):
    ((one,),) = Engine(model, tokenizer).generate([[5, 9, 12, 3]], temperature=0, max_tokens=6)
    dtype = str(next(model.parameters()).dtype)
    print(json.dumps([list(one.completion.tokens), one.text, one.completion.finish, dtype]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder to run in, with the README's `models/llama-math` and an import of it."""
    folder = tmp_path_factory.mktemp("python")
    hf = folder / "models" / "llama-math"
    save_hf("llama-3.1", hf, dtype=torch.bfloat16)
    write_prompts(hf)
    convert = ROOT / "tools" / "convert_checkpoint.py"
    subprocess.run([sys.executable, convert, "from-hf", hf, folder / "imported"], check=True, capture_output=True)
    return folder


def run(code, folder, fails=False):
    """What a process without torchrun prints: the JSON of each line."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


def lines(code, folder):
    return [json.loads(line) for line in run(code, folder).splitlines()]


def test_the_readme_runs(models):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "load_model" in snippet
    assert "Completion(" in run(snippet, models)


def test_every_kind_of_folder_gives_the_same_model(models):
    code = """
model, tokenizer = prism_mcore.load_model("models/llama-math")
show(model, tokenizer)
show(*prism_mcore.load_model("imported"))
show(*prism_mcore.load_model("imported/step_00000000"))
show(*prism_mcore.load_model("models/llama-math", weights="imported", device="cpu"))
show(*prism_mcore.load_model("models/llama-math", weights="random"))
show(*prism_mcore.load_model("models/llama-math", dtype="fp32"))
"""
    first, *same, random, wide = lines(IMPORTS + code, models)
    assert same == [first] * 3
    assert random[0] != first[0]
    assert (first[3], wide[3]) == ("torch.bfloat16", "torch.float32")
    assert isinstance(first[1], str)


def test_every_end_token_of_the_directory_ends_a_response(models, tmp_path):
    """The tokenizer names one; generation_config.json another, too."""
    code = IMPORTS + "show(*prism_mcore.load_model('models/llama-math'))"
    ((tokens, *_),) = lines(code, models)
    file = models / "models" / "llama-math" / "generation_config.json"
    before = file.read_bytes() if file.exists() else None
    try:
        file.write_text(json.dumps({"eos_token_id": [60, tokens[2]]}))
        ((shorter, _, finish, _),) = lines(code, models)
    finally:
        file.unlink() if before is None else file.write_bytes(before)
    assert (shorter, finish) == (tokens[: tokens.index(tokens[2]) + 1], "stop")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("'nowhere'", "nowhere: no such folder"),
        ("'models'", "models holds no checkpoint"),
        ("'models/llama-math', dtype='fp16'", "dtype is 'fp16'"),
        ("'models/llama-math', device='cuda'", "device is cuda, but this process computes on cpu"),
        ("'models/llama-math', kernels={'rope': 'fast'}", "fast"),
    ],
)
def test_what_cannot_be_had_is_said(models, call, message):
    assert message in run(f"import prism_mcore\nprism_mcore.load_model({call})", models, fails=True).splitlines()[-1]


def test_importing_the_package_imports_no_torch():
    code = "import sys, prism_mcore; print('torch' in sys.modules); prism_mcore.nothing"
    assert "has no attribute 'nothing'" in run(code, ROOT, fails=True)
    assert run(code.rsplit(";", 1)[0], ROOT) == "False\n"
