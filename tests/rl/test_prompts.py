"""Prompt files: what is wrong with them is said with file and line; their order is a pure function of the step."""

import json
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from prism_mcore.rl.prompts import PromptError, load_prompts, render
from prism_mcore.text import Tokenizer

WORDS = ["<s>", "</s>", "<unk>", "User", ":", "Assistant", "add", "two", "three", "and", *map(str, range(40))]


@pytest.fixture(scope="module")
def tokenizer():
    words = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return Tokenizer(words, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return SimpleNamespace(path=str(path), weight=1.0, name="")


def record(prompt="add two", **changes):
    return {"prompt": prompt, "reward": "math", "answer": "5"} | changes


def load(*sources, tokenizer, vocab_size=64, longest=32, seed=0):
    return load_prompts(sources, tokenizer, vocab_size=vocab_size, longest=longest, seed=seed)


def test_a_prompt_is_rendered_as_user_and_assistant_with_bos_and_without_eos(tmp_path, tokenizer):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "two and three"}]
    chat = {"messages": messages, "reward": "math", "answer": "5"}
    both_kinds = record() | {"messages": None}
    prompts = load(write(tmp_path / "p.jsonl", both_kinds, "", chat), tokenizer=tokenizer).first(5)
    assert [prompt.text for prompt in prompts] == ["User: add two\nAssistant:", "add\nUser: two and three\nAssistant:"]
    assert [WORDS[i] for i in prompts[0].tokens] == ["<s>", "User", ":", "add", "two", "Assistant", ":"]
    files = load(write(tmp_path / "q.jsonl", "", record() | {"messages": []}, "  ", ""), tokenizer=tokenizer)
    assert len(files) == 1 and files.blank == 3 and files.first(1)[0].text == "User: add two\nAssistant:"
    assert prompts[1].record == chat and prompts[1].source == "p"
    assert render(record()) == "User: add two\nAssistant:"


def test_every_step_has_its_prompts_in_their_shares_and_no_pass_repeats_one(tmp_path, tokenizer):
    many = write(tmp_path / "many.jsonl", *(record(f"add {i}") for i in range(30)))
    few = write(tmp_path / "few.jsonl", *(record(f"two {i}") for i in range(10)))
    many.weight = 3.0
    prompts = load(many, few, tokenizer=tokenizer)
    steps = [prompts.batch(step, 8) for step in range(1, 6)]
    run = [prompt for step in steps for prompt in step]
    assert len({prompt.index for prompt in run}) == len(run) == len(prompts)  # one pass over both
    assert [sum(p.source == "few" for p in run[:n]) for n in (4, 8, 40)] == [1, 2, 10]
    assert [p.index for p in prompts.batch(3, 8)] == [p.index for p in steps[2]]
    later = [p.index for step in range(6, 11) for p in prompts.batch(step, 8)]
    assert sorted(later) == sorted(p.index for p in run) and later != [p.index for p in run]
    other = load(many, few, tokenizer=tokenizer, seed=1)
    assert [p.index for p in other.batch(1, 8)] != [p.index for p in steps[0]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"prompt": ', r"p.jsonl, line 2: not JSON"),
        ("[1]", r"p.jsonl, line 2: \[1\]; needed: a JSON object"),
        (record(reward="maths"), r"p.jsonl, line 2: reward \"maths\"; known rewards are math, gym, choice"),
        (record(answer=""), r"p.jsonl, line 2: reward math needs 'answer'; the record has answer, prompt, reward"),
        (record(answer=" "), r"p.jsonl, line 2: reward math needs 'answer'"),
        (record(reward=["math"]), r"line 2: reward \[.math.\]; known rewards are"),
        (record(reward="gym"), r"p.jsonl, line 2: reward gym needs 'metadata'"),
        (record(answer=["5", "five"]), r"line 2: reward math cannot use the record: answer is .*; needed: one answer"),
        (record(answer={"value": "5"}), "line 2: reward math cannot use the record: answer is .*; needed: one answer"),
        (record(answer=True), "line 2: reward math cannot use the record: answer is true"),
        ('{"prompt": "add", "reward": "math", "answer": NaN}', "line 2: answer is nan, which JSON has no number for"),
        (record(answer="5\udc80"), r"line 2: answer holds half a character, the lone surrogate .udc80"),
        (record("add \ud83d two"), r"line 2: prompt holds half a character, the lone surrogate .ud83d"),
        (record(answer="}{"), "line 2: reward math cannot use the record: answer .* is not right when it is the respo"),
        (
            record(reward="choice", answer="Paris"),
            "line 2: reward choice cannot use .* needed: the letter of",
        ),
        (record(reward="gym", metadata={"level": 1}), "line 2: reward gym cannot .* an object whose source_dataset"),
        (record("  "), r"p.jsonl, line 2: the prompt is empty"),
        ({"reward": "math", "answer": "1"}, r"p.jsonl, line 2: no text under 'prompt' and no 'messages'"),
        (record() | {"messages": 5}, r"p.jsonl, line 2: messages is 5; needed: a list"),
        (record() | {"messages": [{"role": "bot"}]}, r"p.jsonl, line 2: message .* needs a role"),
        ({"messages": None, "reward": "math", "answer": "1"}, r"p.jsonl, line 2: no text under 'prompt'"),
        (
            record() | {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": "5"}]},
            r"p.jsonl, line 2: the last message is the assistant's",
        ),
        (record(" and" * 40), r"p.jsonl, line 2: the prompt has 45 tokens; at most 32 fit"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, second, message):
    with pytest.raises(PromptError, match=message):
        load(write(tmp_path / "p.jsonl", record(), second, record()), tokenizer=tokenizer)


def test_bad_files_and_tokenizers_are_refused(tmp_path, tokenizer):
    with pytest.raises(PromptError, match=r"cannot read .*absent.jsonl: No such file"):
        load(SimpleNamespace(path=str(tmp_path / "absent.jsonl"), weight=1.0, name=""), tokenizer=tokenizer)
    with pytest.raises(PromptError, match="has no prompts"):
        load(write(tmp_path / "empty.jsonl", ""), tokenizer=tokenizer)
    with pytest.raises(PromptError, match=r"rl\.prompts is empty"):
        load(tokenizer=tokenizer)
    with pytest.raises(PromptError, match="the tokenizer has 50 tokens, the model's vocabulary 40: they do not belong"):
        load(write(tmp_path / "p.jsonl", record()), tokenizer=tokenizer, vocab_size=40)
