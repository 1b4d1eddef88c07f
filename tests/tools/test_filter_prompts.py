"""tools/filter_prompts.py with a real model: counts, what is kept, what is taken over, what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny.hf_models import save_hf
from tokenizers import Tokenizer, models, pre_tokenizers

spec = importlib.util.spec_from_file_location(
    "filter_prompts", Path(__file__).parents[2] / "tools" / "filter_prompts.py"
)
filter_prompts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(filter_prompts)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_hf("llama-3.1", folder)
    words = ["<eos>", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"01234567"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_prompts_are_answered_once_graded_and_kept_by_their_count(model, tmp_path, monkeypatch, capsys):
    prompts = [{"prompt": f"q{n}", "answer": answer, "reward": "choice"} for n, answer in enumerate("ABCDAB")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    out = tmp_path / "kept.jsonl"
    files = [str(tmp_path / "prompts.jsonl"), "--hf", str(model), "--out", str(out)]
    command = [*files, "--samples", "64", "--keep", "1-64"]
    settings = ["sampling.max_tokens=1", "precision.dtype=fp32", "sampling.seed=3"]
    assert filter_prompts.main([*command, "--workers", "1", *settings]) == 0
    counts = [json.loads(line)["passes"] for line in Path(f"{out}.graded").read_text().splitlines()]
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(counts) == 6 and 0 < sum(counts) < 6 * 64
    assert kept == [prompt | {"passes": n} for prompt, n in zip(prompts, counts, strict=True) if n]
    assert (tmp_path / "kept.png").stat().st_size > 1000 and "/64" in capsys.readouterr().out
    # The samples are there: nothing is generated again, another rule keeps others.
    monkeypatch.setattr(filter_prompts.subprocess, "run", lambda *_, **__: pytest.fail("generated again"))
    again = [*command[:-1], "0", "--workers", "1", *settings]
    assert filter_prompts.main(again) == 0
    assert len(out.read_text().splitlines()) == counts.count(0)


def test_what_is_chosen():
    passes = [0, 1, 16, 0, 1, 7, 0]
    assert filter_prompts.chosen(passes, 1, 1, 0, 0) == [1, 4]
    assert filter_prompts.chosen(passes, 1, 16, 0, 0) == [1, 2, 4, 5]
    topped = filter_prompts.chosen(passes, 1, 16, 6, 0)
    assert len(topped) == 6 and {1, 2, 4, 5} < set(topped) and topped == sorted(topped)
    assert filter_prompts.chosen(passes, 1, 16, 100, 0) == list(range(7))
    assert filter_prompts.chosen(passes, 0, 0, 7, 0) == [0, 3, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "1-17"], "--keep 1-17: needed: numbers from 0 to --samples, which is 16"),
        (["--keep", "many"], "--keep many: needed: a number of right answers, or FEWEST-MOST"),
        (["--frobnicate"], "unknown argument --frobnicate"),
        ([], "line 1: "),
    ],
)
def test_bad_input_is_refused_before_anything_is_generated(arguments, message, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1", "reward": "math"}\n')
    out = tmp_path / "kept.jsonl"
    command = [str(tmp_path / "prompts.jsonl"), "--hf", str(tmp_path), "--out", str(out), *arguments]
    assert filter_prompts.main(command) == 2
    assert message in capsys.readouterr().err and list(tmp_path.glob("kept*")) == []
