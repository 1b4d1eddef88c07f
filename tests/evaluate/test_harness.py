"""lm_eval's tasks on our engine: its own HF model's numbers, on one rank, data- and tensor-parallel."""

import json
from datetime import timedelta

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from ranks import run_ranks
from tiny.engines import engine_on
from tiny.hf_models import save_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prism_mcore.evaluate.harness import EngineLM, ask, table_of, task_manager
from prism_mcore.evaluate.settings import HarnessSettings
from prism_mcore.meeting import Meeting
from prism_mcore.text import load_tokenizer

TIMEOUT = timedelta(seconds=60)
CHARACTERS = ["<s>", "</s>", " ", ".", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"01234"]


@pytest.fixture(scope="module", params=["llama-3.1", "granite-4.0-h-micro"])
def hf(request, tmp_path_factory):
    """A model, and a tokenizer of 61 characters that puts BOS in front."""
    folder = tmp_path_factory.mktemp("harness")
    save_hf(request.param, folder, eos_token_id=1, bos_token_id=0)
    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="."))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    words.add_special_tokens(["<s>", "</s>"])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def instances(kind, arguments):
    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


LOGLIKELIHOODS = [
    ("The cat", " sat"),
    ("The cat", " ran away"),
    ("The cat ", "sat"),  # the space goes over to the continuation
    ("", "Hello"),
    ("A", "b"),
    ("a" * 80, " too long for the model"),
    ("<s>The cat", " sat"),
]
ROLLING = [("Hello there.",), ("x",), ("The quick brown fox. " * 9,)]
GREEDY = [
    ("The cat", {"until": ["zz"], "max_gen_toks": 9}),
    ("A dog", {"until": ["zz"], "max_gen_toks": 9}),
    ("Hello", {"until": [], "max_gen_toks": 5, "do_sample": False}),
    ("b" * 90, {"until": ["\n\n"], "max_gen_toks": 7}),
]
SAMPLED = [("The cat", {"until": ["zz"], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0})] * 3


def lm_on(groups, hf):
    tokenizer = load_tokenizer(hf)
    return EngineLM(engine_on(groups, hf, tokenizer=tokenizer), tokenizer, groups, Meeting.of_all_ranks(TIMEOUT))


def asked(groups, hf, generations):
    """Everything that lm_eval asks, answered by one rank."""
    lm = lm_on(groups, hf)
    return [*answers(lm, generations), lm.generate_until(instances("generate_until", SAMPLED))]


def answers(lm, generations):
    return [
        lm.loglikelihood(instances("loglikelihood", LOGLIKELIHOODS)),
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", ROLLING)),
        lm.generate_until(instances("generate_until", generations)),
    ]


def test_answers_are_those_of_lm_evals_own_model(hf):
    theirs = HFLM(pretrained=str(hf), device="cpu", dtype="float32", batch_size=1)
    (text,) = theirs.generate_until(instances("generate_until", GREEDY[:1]))
    generations = [*GREEDY, ("The cat", {"until": [text[3:5]], "max_gen_toks": 9})]
    pairs, rolling, texts = answers(theirs, generations)
    assert texts[-1] == text.split(text[3:5])[0] != text
    for layout in ({"tp": 1}, {"tp": 2}, {"dp": 2}):
        ranks = max(layout.values())
        found = run_ranks(ranks, asked, hf, generations, **{key: n for key, n in layout.items() if key == "tp"})
        for ours in found:
            assert [greedy for _, greedy in ours[0]] == [greedy for _, greedy in pairs]
            assert [value for value, _ in ours[0]] == pytest.approx([value for value, _ in pairs], abs=1e-4, rel=1e-5)
            assert ours[1] == pytest.approx(rolling, abs=1e-4, rel=1e-5)
            assert ours[2] == texts
            assert len(set(ours[3])) == 3 and ours[3] == found[0][3]


TASK = """
task: ours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_runs_whole_and_is_saved_in_its_format(hf, tmp_path):
    """A task file of one's own, offline; the results are those of lm_eval with its HF model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lines = [
        {"question": f"Is it {c}", "choices": [" yes", " no", " maybe so"], "answer": n % 3}
        for n, c in enumerate("abcdefg")
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/ours.yaml").write_text(TASK.replace("FILE", str(tmp_path / "test.jsonl")))
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(hf), device="cpu", dtype="float32", batch_size=4),
        tasks=["ours"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
        bootstrap_iters=100,
    )
    for ranks in (1, 2):  # lm_eval's own model pads batches: its accuracy is that of log-likelihoods equal to 1e-4
        run_ranks(ranks, run_task, hf, tmp_path, tmp_path / f"out{ranks}")
        (file,) = (tmp_path / f"out{ranks}").rglob("results_*.json")
        saved = json.loads(file.read_text())
        assert saved["results"]["ours"]["acc,none"] == pytest.approx(theirs["results"]["ours"]["acc,none"])
        assert saved["config"]["model"] == "prism_mcore" and saved["config"]["data_parallel"] == ranks
        (samples,) = (tmp_path / f"out{ranks}/models__x").rglob("samples_ours_*.jsonl")
        assert len(samples.read_text().splitlines()) == 7


def run_task(groups, hf, folder, out):
    how = HarnessSettings(include=str(folder / "tasks"))
    results = ask(lm_on(groups, hf), ["ours"], task_manager(["ours"], how), how, "models/x", out)
    assert (results is None) == (groups.rank > 0)
    if results is not None:
        (row,) = zip(*(column.cells for column in table_of(results).columns), strict=True)
        assert row[:3] == ("ours", "acc", "none") and 0 <= float(row[3]) <= 1


def test_what_cannot_be_asked_is_said(tmp_path):
    with pytest.raises(ValueError, match="--lm-eval no-such: lm_eval has no such task"):
        task_manager(["no-such"], HarnessSettings())
    with pytest.raises(ValueError, match=r"harness\.include=.* there is no such folder"):
        task_manager(["arc_easy"], HarnessSettings(include=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="generation with num_beams; known are do_sample"):
        EngineLM._kwargs({"num_beams": 4})


def test_stop_texts_and_answers_behind_the_reasoning(hf):
    (found,) = run_ranks(1, answers_behind_think, hf)
    assert found == ["the answer", "7"]


def answers_behind_think(groups, hf):
    lm = lm_on(groups, hf)
    lm.after_think = True
    lm.text.decode = lambda tokens, special=False: "".join(tokens) if len(tokens) > 1 else "</s>"
    return [
        lm._text(["<think>no\n\n", "x</think>\n", "the answer", "\n\nmore"], ["\n\n"]),
        lm._text(["7", "</s>"], []),
    ]
