"""From documents to token files: every input format, chats and masks, broken input, and nothing half-written."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from prism_mcore.data import tokenizing
from prism_mcore.data.corpus import CorpusError
from prism_mcore.data.token_file import TokenFile
from prism_mcore.data.tokenizing import tokenize_files, train_bpe
from prism_mcore.text import Tokenizer, load_tokenizer, render_chat

TOOL = Path(__file__).parents[2] / "tools" / "tokenize_corpus.py"
TEXTS = [f"Document {i} counts {i * 37} things: " + "the quick brown fox, " * (i % 7) + "ünïcödé." for i in range(60)]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "<think>\n12 + 30 = 42\n</think>\n42"},
    {"role": "user", "content": "And twice that?"},
    {"role": "assistant", "content": "84"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus in plain JSONL and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) for text in TEXTS] + [json.dumps({"messages": CHAT})]
    (folder / "plain.jsonl").write_text("\n".join(lines))
    train_bpe([folder / "plain.jsonl"], 320, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer")


def decoded(prefix: Path, folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    file = IndexedDataset(str(prefix))
    return [tokenizer.decode(document) for document in file]


def test_all_formats_give_the_same_documents(folder, tokenizer, tmp_path):
    raw = (folder / "plain.jsonl").read_bytes()
    lines = raw.split(b"\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    # Two frames, as appending to a .zst leaves them.
    parts = [zstandard.compress(b"\n".join(lines[:20]) + b"\n"), zstandard.compress(b"\n".join(lines[20:]))]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(parts))
    records = [json.loads(line) for line in lines]
    rows = [{"text": record.get("text"), "messages": record.get("messages")} for record in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    plain = tokenize_files([folder / "plain.jsonl"], tmp_path / "plain", tokenizer, workers=1)
    assert plain["documents"] == 61 and plain["tokens"] == TokenFile(tmp_path / "plain").num_tokens
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        other = tokenize_files([tmp_path / name], tmp_path / "other", tokenizer, workers=1)
        assert other["content_sha256"] == plain["content_sha256"]


def test_documents_survive_and_are_shuffled(folder, tokenizer, tmp_path):
    tokenize_files([folder / "plain.jsonl"], tmp_path / "c", tokenizer, workers=1)
    tokenize_files([folder / "plain.jsonl"], tmp_path / "d", tokenizer, workers=1, seed=1)
    expected = [text + "<|eos|>" for text in [*TEXTS, render_chat(CHAT).text]]
    found, other = decoded(tmp_path / "c", folder), decoded(tmp_path / "d", folder)
    assert sorted(found) == sorted(expected) == sorted(other)
    assert expected != found != other


def test_the_result_does_not_depend_on_the_number_of_processes(folder, tokenizer, tmp_path):
    # More than one chunk of 1 MiB, so that both processes work.
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": "a b c 1 " * 400}) + "\n") * 400)
    one, two = (
        tokenize_files([tmp_path / "long.jsonl", folder / "plain.jsonl"], tmp_path / f"w{n}", tokenizer, workers=n)
        for n in (1, 2)
    )
    assert one == two and (tmp_path / "w1.idx").read_bytes() == (tmp_path / "w2.idx").read_bytes()


def test_chats_are_written_the_papers_way():
    document = render_chat(CHAT)
    assert document.text == (
        "Be brief.\nUser: What is 12 + 30?\nAssistant: <think>\n12 + 30 = 42\n</think>\n42\n"
        "User: And twice that?\nAssistant: 84"
    )
    assert [document.text[a:b] for a, b in document.answers] == ["<think>\n12 + 30 = 42\n</think>\n42", "84"]


def test_the_mask_counts_the_answers_and_the_end_only(folder, tokenizer, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": CHAT[:4]}))
    tokenize_files([tmp_path / "chat.jsonl"], tmp_path / "c", tokenizer, mask_prompts=True, workers=1)
    auto = AutoTokenizer.from_pretrained(folder / "tokenizer")
    file, theirs = TokenFile(tmp_path / "c"), IndexedDataset(str(tmp_path / "c"))
    for number, start in enumerate(file.document_starts(0, 2)):
        mask = np.empty(len(theirs[number]), np.uint8)
        file.read_mask(int(start), mask)
        learnt = auto.decode(theirs[number][mask == 1])
        answers = ["<think>\n12 + 30 = 42\n</think>\n42"]
        if "84" in auto.decode(theirs[number]):
            answers.append("84<|eos|>")
        # The token "<" may hold the space before it.
        assert learnt.removeprefix(" ") == "".join(answers)
        assert theirs[number][-1] == tokenizer.eos_id


def test_empty_documents_are_left_out_and_counted(folder, tokenizer, tmp_path):
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n{"text": "words"}\n{"text": " \\n"}\n{"messages": []}\n')
    manifest = tokenize_files([tmp_path / "e.jsonl"], tmp_path / "c", tokenizer, workers=1)
    assert (manifest["documents"], manifest["skipped_empty_documents"]) == (1, 3)
    assert TokenFile(tmp_path / "c").manifest == manifest


def test_a_corpus_of_nothing_is_an_error(folder, tokenizer, tmp_path):
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"e\.jsonl: no documents \(1 empty ones\)"):
        tokenize_files([tmp_path / "e.jsonl"], tmp_path / "c", tokenizer, workers=1)


def test_the_manifest_knows_the_largest_token(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_COPY_DOCUMENTS", 4)
    manifest = tokenize_files([folder / "plain.jsonl"], tmp_path / "c", tokenizer, workers=1)
    theirs = IndexedDataset(str(tmp_path / "c"))
    assert manifest["max_token_id"] == max(int(document.max()) for document in theirs)
    assert manifest["max_token_id"] in theirs[manifest["max_token_document"]]


def test_special_tokens_in_a_text_stay_text(folder, tokenizer, tmp_path):
    (tmp_path / "e.jsonl").write_text(json.dumps({"text": "a <|eos|> b <|pad|>"}))
    tokenize_files([tmp_path / "e.jsonl"], tmp_path / "c", tokenizer, workers=1)
    theirs = IndexedDataset(str(tmp_path / "c"))  # its documents are views that die with it
    (document,) = theirs
    assert (document == tokenizer.eos_id).tolist() == [False] * (len(document) - 1) + [True]


def test_the_trained_tokenizer_is_an_hf_directory(folder):
    auto = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>") and len(auto) == 320
    text = "Zażółć 12345 日本\n\tx = 7"
    ids = auto.encode(text, add_special_tokens=False)
    assert auto.decode(ids) == text
    pieces = [auto.decode([i]) for i in ids]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == [*"12345", "7"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 3: not JSON: Unterminated string starting at at column 10"),
        ('{"body": "x"}', r"line 3: no text under 'text' and no 'messages'; the record has \['body'\]"),
        ('{"text": null}', "line 3: no text under 'text'"),
        ("[1, 2]", "line 3: got a JSON list"),
        ("", "line 3: not JSON: Expecting value at column 1"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "line 3: .*needs a role of"),
        ('{"messages": [{"role": "user"}]}', "line 3: .*needs a role of"),
        ('{"messages": "hello"}', "line 3: 'messages' is a str"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_left(tokenizer, tmp_path, line, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "fine"}\n{"text": "too"}\n' + line + '\n{"text": "more"}\n')
    with pytest.raises(CorpusError, match=rf"b\.jsonl, {message}"):
        tokenize_files([tmp_path / "in" / "b.jsonl"], tmp_path / "out" / "c", tokenizer, workers=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_archives_are_named(tokenizer, tmp_path):
    good = json.dumps({"text": "words " * 100}).encode() * 50
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(good)[:-20])
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstandard at all")
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "d.parquet")
    for name, message in [
        ("a.jsonl.gz", "decompressed"),
        ("b.jsonl.zst", "decompressed"),
        ("c.parquet", "not a parquet"),
    ]:
        with pytest.raises(CorpusError, match=rf"{name}: .*{message}"):
            tokenize_files([tmp_path / name], tmp_path / "out", tokenizer, workers=1)
    with pytest.raises(CorpusError, match=r"d\.parquet: no column 'text' or 'messages'; it has \['body'\]"):
        tokenize_files([tmp_path / "d.parquet"], tmp_path / "out", tokenizer, workers=1)


def test_the_command_makes_one_file_per_input_with_one_tokenizer(tmp_path):
    for domain in ("code", "math"):
        (tmp_path / f"{domain}.jsonl").write_text(
            "".join(json.dumps({"body": f"{domain} {text}"}) + "\n" for text in TEXTS)
        )
    command = [
        sys.executable,
        TOOL,
        str(tmp_path / "*.jsonl"),
        "--out",
        tmp_path / "out",
        "--per-file",
        "--train-bpe",
        "300",
    ]
    command += ["--tokenizer", tmp_path / "tok", "--text-key", "body", "--workers", "2"]
    subprocess.run(command, check=True, capture_output=True)
    manifests = {domain: TokenFile(tmp_path / "out" / domain).manifest for domain in ("code", "math")}
    assert [manifest["domain"] for manifest in manifests.values()] == ["code", "math"]
    assert len({manifest["tokenizer_sha256"] for manifest in manifests.values()}) == 1
    assert {manifest["documents"] for manifest in manifests.values()} == {60}


def test_a_full_disk_leaves_no_output(folder, tmp_path):
    """RLIMIT_FSIZE stands in for the full disk. The command ends with one line and no file under the final names."""
    (tmp_path / "big.jsonl").write_text(json.dumps({"text": "all different words 1 2 3 " * 20_000}))
    limited = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limited += f"sys.argv = sys.argv[1:]; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    arguments = [TOOL, tmp_path / "big.jsonl", "--out", tmp_path / "out" / "c", "--tokenizer", folder / "tokenizer"]
    result = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    assert "tokenize_corpus: [Errno 27] File too large" in result.stderr and "Traceback" not in result.stderr
    assert list((tmp_path / "out").iterdir()) == []
