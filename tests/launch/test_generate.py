"""launch/generate.py with a real torchrun: transformers' greedy text, the same samples in any layout, one message for
bad input."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny.engines import engine_on
from tiny.hf_models import save_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from prism_mcore.plan import host
from prism_mcore.text import StopTexts, response_text
from prism_mcore.text import Tokenizer as ModelTokenizer

ROOT = Path(__file__).parents[2]
WORDS = [
    "<eos>",
    *"abcdefghijklmnopqrstuvwxyz",
    *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    *"01234567",
]  # 61, the models' vocabulary


def save_tokenizer(folder, words=WORDS):
    """One character, one token; decoding puts a space between two."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def generate(ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "launch/generate.py"]
    return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    model = save_hf("granite-4.0-h-micro", folder / "hf")
    save_tokenizer(folder / "hf")
    prompts = [{"prompt": "abc", "answer": 5}, {"tokens": [9, 4, 7, 7]}, {"prompt": "HELLO"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n\n")
    return folder, model, prompts


def their_greedy(model, tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[-count:]


def launched(ranks, folder, name, *more):
    out, files = folder / name, ["--hf", folder / "hf", "--prompts", folder / "prompts.jsonl"]
    how = ["precision.dtype=fp32", "sampling.max_tokens=9", "sampling.ignore_eos=true", "sampling.samples=2"]
    done = generate(ranks, *files, "--out", out, *how, *more)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("*.part")) and not list(folder.glob("*.samples*"))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("answer") for line in lines] == [5, 5, None, None, None, None]  # the prompts' own keys and order
    assert all(len(line["logprobs"]) == 9 and line["finish_reason"] == "length" for line in lines)
    return lines


def test_a_killed_generation_goes_on_from_its_samples_in_another_layout(case, tmp_path, capsys, monkeypatch):
    """Each sample is written when it is done; a line that the kill tears is drawn again."""
    prompts, out, written = [[n, 7] for n in range(60)], tmp_path / "out.jsonl", tmp_path / "out.jsonl.samples"
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"tokens": {prompt}}}\n' for prompt in prompts))
    files = ["--hf", case[0] / "hf", "--prompts", tmp_path / "prompts.jsonl", "--out", out]
    how = ["precision.dtype=fp32", "sampling.max_tokens=9", "sampling.ignore_eos=true", "sampling.samples=4"]
    command = [sys.executable, "launch/generate.py", *map(str, files), *how, "generate.slots=1"]
    slow = subprocess.Popen(command, cwd=ROOT)
    while not written.exists() or written.read_text().count("\n") < 5:
        assert slow.poll() is None
        time.sleep(0.02)
    slow.send_signal(signal.SIGSTOP)
    second = generate(1, *files, *how)
    assert second.returncode != 0 and f"error: {out} is in use by process {slow.pid} on" in second.stderr
    slow.kill()
    slow.wait()
    lines = written.read_text().splitlines(keepends=True)
    assert len(lines) < 240 and not out.exists()
    written.write_text("".join(lines)[:-20])
    (tmp_path / "out.jsonl.samples.7").write_text(lines[0] + lines[1])  # of a rank that there is no more

    assert run_here(monkeypatch, case[0] / "hf", tmp_path, *how, "sampling.temperature=0.5") == 2
    assert "an unfinished generation with sampling.temperature=1.0, not 0.5; go on" in capsys.readouterr().err
    done = generate(2, *files, *how)
    assert done.returncode == 0, done.stderr
    assert f"240 responses, {len(lines) - 2} of them from before," in done.stdout
    sampling = {"samples": 4, "max_tokens": 9, "ignore_eos": True}
    answers = run_ranks(1, responses, case[0], prompts, sampling)[0]
    found = [json.loads(line)["response_tokens"] for line in out.read_text().splitlines()]
    assert found == [list(tokens) for _, tokens, _ in answers]
    assert {file.name for file in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


def test_two_replicas_answer_as_transformers_does(case):
    folder, model, prompts = case
    lines = launched(2, folder, "greedy.jsonl", "sampling.temperature=0", "generate.slots=1")
    for number, line in enumerate(lines):
        prompt = prompts[number // 2]
        tokens = prompt.get("tokens") or [WORDS.index(c) for c in prompt["prompt"]]
        assert line["response_tokens"] == their_greedy(model, tokens, 9)
        assert line["response"] == " ".join(WORDS[token] for token in line["response_tokens"] if token)


def test_tensor_parallel_ranks_draw_what_the_library_draws_on_one(case):
    folder, _, prompts = case
    lines = launched(2, folder, "drawn.jsonl", "parallel.tp=2", "sampling.seed=3")
    sampling = {"seed": 3, "samples": 2, "max_tokens": 9, "ignore_eos": True}
    answers = run_ranks(1, responses, folder, [p.get("prompt") or p["tokens"] for p in prompts], sampling)[0]
    assert [line["response_tokens"] for line in lines] == [list(tokens) for _, tokens, _ in answers]
    assert lines[0]["response_tokens"] != lines[1]["response_tokens"]


def responses(groups, folder, prompts, sampling):
    """(text, tokens, end) of every response, through the library's front door."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    answers = engine_on(groups, folder / "hf", tokenizer=tokenizer).generate(prompts, **sampling)
    return [(r.text, r.completion.tokens, r.completion.finish) for group in answers for r in group]


def test_a_stop_text_ends_a_response_and_is_not_part_of_it(case):
    how = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    ((text, tokens, finish),) = run_ranks(1, responses, case[0], ["abc"], how)[0]
    assert finish == "length" and len(tokens) == 12
    mark = text[4:9]  # three tokens and the spaces between them
    ((cut, fewer, finish),) = run_ranks(1, responses, case[0], ["abc"], how | {"stop": ["nowhere", mark]})[0]
    assert cut == text[: text.index(mark)] and finish == "stop"
    assert fewer == tokens[: len(fewer)] and len(fewer) < 12


def test_a_special_token_may_be_a_stop_text():
    """Responses are shown without special tokens; where they end is looked for with them."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "<end>": 3}, unk_token="<eos>"))
    words.add_special_tokens(["<end>"])
    tokenizer = ModelTokenizer(words)
    stop = StopTexts(tokenizer, ["<end>"])
    assert stop.reached([1, 3]) and not stop.reached([1, 2])
    assert response_text(tokenizer, [1, 2, 3], ["<end>"]) == "a b"


def costs_of(groups, hf):
    return engine_on(groups, hf).replica.costs


def test_what_one_replica_cannot_do_is_said(tmp_path):
    """Memory for the first replica's short prompt, not for the second's long one."""
    save_hf("granite-4.0-h-micro", tmp_path / "hf", max_position_embeddings=256)
    (costs,) = run_ranks(1, costs_of, tmp_path / "hf")
    (tmp_path / "prompts.jsonl").write_text(f'{{"tokens": [5]}}\n{{"tokens": {[5] * 200}}}\n')
    files = ["--hf", tmp_path / "hf", "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out.jsonl"]
    room = (3 * costs.slot + 4 * costs.block) / 1e9
    done = generate(2, *files, "precision.dtype=fp32", "sampling.max_tokens=9", f"generate.cache_gb={room}")
    assert done.returncode != 0 and not (tmp_path / "out.jsonl").exists()
    assert "error: rank 1: generate.cache_gb" in done.stderr


WRONG = {
    "a broken line": ('{"prompt": "a"}\n{"prompt": ', [], "prompts.jsonl, line 2: not JSON"),
    "no object": ("[1, 2]\n", [], "line 1: [1, 2]; needed: a JSON object"),
    "half a character": (
        '{"prompt": "a"}\n{"prompt": "a\\ud83d"}\n',
        [],
        "line 2: prompt holds half a character, the lone surrogate \\ud83d",
    ),
    "half a character in a field of no use here": (
        '{"prompt": "a", "from": ["b", {"id": "\\udcff"}]}\n',
        [],
        "line 1: from[1].id holds half a character, the lone surrogate \\udcff",
    ),
    "half a character as a name": (
        '{"prompt": "a", "\\udcff": 1}\n',
        [],
        "a name of the object holds half a character",
    ),
    "no number": ('{"prompt": "a", "score": NaN}\n', [], "line 1: score is nan, which JSON has no number for"),
    "a number beyond all": ('{"prompt": "a", "score": [-1e999]}\n', [], "line 1: score[0] is -inf, which JSON"),
    "nested without end": ('{"prompt": ' + "[" * 100_000 + "\n", [], "line 1: not JSON that can be read"),
    "neither": ('{"text": "a"}\n', [], "line 1: an object with text; needed"),
    "empty": ('\n{"prompt": ""}\n', [], "line 2: the prompt is empty"),
    "no tokens": ('{"tokens": []}\n', [], "line 1: the prompt is empty"),
    "another vocabulary": ('{"tokens": [3, 61]}\n', [], "line 1: the prompt holds token 61; needed: ids from 0 to 60"),
    "longer than the context": (json.dumps({"prompt": "a" * 64}), [], "64 tokens; needed: fewer than the model's 64"),
    "nothing": ("\n", [], "prompts.jsonl has no prompts"),
    "a pipeline": ('{"prompt": "a"}\n', ["parallel.vpp=2"], "generated on one stage; use pp=1"),
    "a setting of another kind": (
        '{"prompt": "a"}\n',
        ["train.steps=3"],
        "train.steps is a setting of launch/midtrain.py and launch/rl.py",
    ),
    "a misspelt setting": ('{"prompt": "a"}\n', ["sampling.temprature=1"], "nearest: sampling.temperature"),
    "an empty stop text": (
        '{"prompt": "a"}\n',
        ['sampling.stop=[""]'],
        "sampling.stop.0='': string should have at least 1",
    ),
    "a stop token of another vocabulary": ('{"prompt": "a"}\n', ["sampling.stop_ids=[99]"], "stop_ids holds 99"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gives_one_message_and_no_file(case, tmp_path, capsys, monkeypatch, name):
    text, arguments, message = WRONG[name]
    (tmp_path / "prompts.jsonl").write_text(text)
    assert run_here(monkeypatch, case[0] / "hf", tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda: 10_000)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert run_here(monkeypatch, case[0] / "hf", tmp_path) == 2
    error = capsys.readouterr().err
    assert "needs some 0.0" in error and "this machine has 1e-05 GB free; free memory, set sampling.max_tokens" in error
    assert run_here(monkeypatch, case[0] / "hf", tmp_path, "--dry-run") == 0
    assert "1e-05 GB are free" in " ".join(capsys.readouterr().out.split())


def test_blank_lines_are_skipped_and_counted(case, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('\n{"prompt": "a"}\n  \n')
    assert run_here(monkeypatch, case[0] / "hf", tmp_path, "--dry-run") == 0
    assert "note: 2 blank lines of" in capsys.readouterr().out


def test_a_folder_without_a_model_is_named(tmp_path, capsys, monkeypatch):
    assert run_here(monkeypatch, tmp_path / "hf", tmp_path) == 2
    assert "hf: there is no config.json; give the model's Hugging Face directory" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(tmp_path, capsys, monkeypatch):
    save_hf("llama-3.1", tmp_path / "hf")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert run_here(monkeypatch, tmp_path / "hf", tmp_path) == 2
    assert "line 1: the prompt is text, and there is no tokenizer (tokenizer.json)" in capsys.readouterr().err
    save_tokenizer(tmp_path / "hf", [*WORDS, "8"])
    assert run_here(monkeypatch, tmp_path / "hf", tmp_path) == 2
    assert "the tokenizer has 62 tokens, the model's vocabulary 61" in capsys.readouterr().err


def run_here(monkeypatch, hf, folder, *arguments):
    files = ["--hf", hf, "--prompts", folder / "prompts.jsonl", "--out", folder / "out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, files), *arguments])
    spec = importlib.util.spec_from_file_location("generate_launcher", ROOT / "launch" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()
