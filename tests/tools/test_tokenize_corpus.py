"""From documents to token files: every input format, chats and masks, broken input, and nothing half-written."""

import codecs
import glob
import gzip
import importlib.util
import io
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from prism_mcore.data import tokenizing
from prism_mcore.data.corpus import CorpusError, documents, expand, read_chunks
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
        (r'{"text": "scraped \ud83d half an emoji"}', r"line 3: half a character, the lone surrogate \\ud83d, at char"),
        (r'{"messages": [{"role": "user", "content": "hi \udcb2"}]}', r"line 3: half a character.* \\udcb2"),
        ('{"text": 5}', r"line 3: no text under 'text' \(it is a int\)"),
        ('{"text": "a", "text": "b"}', "line 3: 'text' stands 2 times in one object; leave one"),
        ('{"messages": [{"role": "user", "role": "system", "content": "x"}]}', "line 3: 'role' stands 2 times"),
        ('{"messages": {}}', "line 3: 'messages' is a dict"),
        ("{" + '"a":[' * 100_000, "line 3: "),
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


NOISE = np.random.default_rng(0).integers(97, 123, 400_000, dtype=np.uint8).tobytes().decode()  # does not compress
LINES = [json.dumps({"text": f"{i} {NOISE[100 * i : 100 * i + 100]}"}).encode() + b"\n" for i in range(4000)]
ROWS = pyarrow.table({"text": [json.loads(line)["text"] for line in LINES]})


def zstd(lines):
    return zstandard.ZstdCompressor(write_checksum=True).compress(b"".join(lines))  # as the command does


def gz(lines):
    return gzip.compress(b"".join(lines))


def flipped(raw, place):
    """The bytes with the middle of them overwritten."""
    at = int(len(raw) * place)
    return raw[:at] + bytes(b ^ 0xA5 for b in raw[at : at + 64]) + raw[at + 64 :]


def parquet(**how):
    out = io.BytesIO()
    pyarrow.parquet.write_table(ROWS, out, row_group_size=500, **how)
    return out.getvalue()


SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"note"
MID_FRAME = "it ends in the middle of a zstd frame"
DAMAGED = {
    "cut.jsonl.zst": (lambda: zstd(LINES)[: len(zstd(LINES)) // 2], MID_FRAME),
    "last-byte.jsonl.zst": (lambda: zstd(LINES)[:-1], MID_FRAME),
    "second-frame.jsonl.zst": (lambda: zstd(LINES[:2000]) + zstd(LINES[2000:])[:-9], MID_FRAME),
    "second-header.jsonl.zst": (lambda: zstd(LINES) + zstd(LINES)[:5], MID_FRAME),
    "one-byte.jsonl.zst": (lambda: zstd(LINES)[:1], MID_FRAME),
    "skippable-cut.jsonl.zst": (lambda: zstd(LINES) + SKIPPABLE[:-1], MID_FRAME),
    "flipped.jsonl.zst": (lambda: flipped(zstd(LINES), 0.5), "decompressed"),
    "no.jsonl.zst": (lambda: b"no zstandard at all", "decompressed"),
    "rubbish-behind.jsonl.zst": (lambda: zstd(LINES) + b"\0rubbish", "decompressed"),
    "empty.jsonl.zst": (lambda: b"", "0 bytes, not even a header"),
    "cut.jsonl.gz": (lambda: gz(LINES)[:-20], "Compressed file ended before the end-of-stream marker"),
    "half.jsonl.gz": (lambda: gz(LINES)[: len(gz(LINES)) // 2], "ended before the end-of-stream marker"),
    "flipped.jsonl.gz": (lambda: flipped(gz(LINES), 0.5), "decompressed"),
    "sum.jsonl.gz": (lambda: gz(LINES)[:-8] + b"12345678", "CRC check failed"),
    "no.jsonl.gz": (lambda: b"no gzip at all", "Not a gzipped file"),
    "rubbish-behind.jsonl.gz": (lambda: gz(LINES) + b"rubbish", "decompressed"),
    "empty.jsonl.gz": (lambda: b"", "0 bytes, not even a header"),
    "no.parquet": (lambda: b"no parquet at all", "not a parquet file"),
    "empty.parquet": (lambda: b"", "not a parquet file"),
    "cut.parquet": (lambda: parquet()[: len(parquet()) // 2], "not a parquet file"),
    "flipped.parquet": (lambda: flipped(parquet(write_page_checksum=True), 0.5), r"damaged after row \d+ of 4000"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_by_name_and_nothing_is_left(tokenizer, tmp_path, name):
    raw, message = DAMAGED[name]
    (tmp_path / name).write_bytes(raw())
    with pytest.raises(CorpusError, match=rf"{re.escape(name)}: .*{message}"):
        tokenize_files([tmp_path / name], tmp_path / "out" / "c", tokenizer, workers=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_error_says_how_far_a_file_was_read(tmp_path):
    raw = zstd(LINES)
    (tmp_path / "c.zst").write_bytes(raw[: len(raw) * 9 // 10])
    with pytest.raises(CorpusError, match=r"c\.zst: .*; \d+ lines and (\d+) of \1 bytes were read before"):
        list(read_chunks(str(tmp_path / "c.zst"), "text"))


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("frames.zst", lambda: b"".join(zstd(LINES[i : i + 700]) for i in range(0, 4000, 700))),
        ("skippable.zst", lambda: SKIPPABLE + zstd(LINES[:7]) + SKIPPABLE + zstd(LINES[7:]) + SKIPPABLE),
        ("empty-frame.zst", lambda: zstd(LINES) + zstd([])),
        ("no-size.zst", lambda: zstandard.ZstdCompressor(write_content_size=False).compress(b"".join(LINES))),
        ("members.gz", lambda: gz(LINES[:9]) + gz(LINES[9:])),
        ("plain.jsonl", lambda: b"".join(LINES)[:-1]),
        ("crlf.jsonl", lambda: b"".join(LINES).replace(b"\n", b"\r\n")),
        ("bom.jsonl", lambda: codecs.BOM_UTF8 + b"".join(LINES)),
        ("bom.jsonl.gz", lambda: gz([codecs.BOM_UTF8, *LINES])),
        ("blank.jsonl", lambda: b"\n" + b"\n  \r\n".join(LINES) + b"\n\n"),
        ("c.parquet", parquet),
    ],
)
def test_whole_files_of_every_make_are_read_to_their_ends(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw())
    chunks = list(read_chunks(str(tmp_path / name), "text"))
    texts = [document.text for chunk in chunks for document in documents(chunk, "text")]
    assert texts == ROWS["text"].to_pylist()


def test_blank_lines_are_skipped_and_counted_and_others_keep_their_number(tokenizer, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n  \n{"text": "two"}\n\n')
    manifest = tokenize_files([tmp_path / "b.jsonl"], tmp_path / "c", tokenizer, workers=1)
    assert (manifest["documents"], manifest["skipped_blank_lines"]) == (2, 3)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n  \n{"text": 2}\n\n')
    with pytest.raises(CorpusError, match=r"b\.jsonl, line 4: no text"):
        tokenize_files([tmp_path / "b.jsonl"], tmp_path / "c", tokenizer, workers=1)


def test_a_chat_of_nothing_does_not_hide_the_text_beside_it(tokenizer, tmp_path):
    rows = [{"text": "real", "messages": []}, {"text": "other", "messages": None}, {"text": None, "messages": CHAT}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    for name in ("m.jsonl", "m.parquet"):
        (chunk,) = read_chunks(str(tmp_path / name), "text")
        assert [document.text for document in documents(chunk, "text")] == ["real", "other", render_chat(CHAT).text]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["x"]}, r"c\.parquet: no column 'text' or 'messages'; it has \['body'\]"),
        ({"text": ["x", None]}, r"c\.parquet, row 2: no text under 'text' and no 'messages'"),
        ({"text": [b"x"]}, r"c\.parquet, row 1: no text under 'text' \(it is a bytes\)"),
        ({"text": [7]}, r"c\.parquet, row 1: no text under 'text' \(it is a int\)"),
        ({"messages": ["x"]}, r"c\.parquet, row 1: 'messages' is a str"),
    ],
)
def test_columns_of_another_kind_are_named(tokenizer, tmp_path, table, message):
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match=message):
        tokenize_files([tmp_path / "c.parquet"], tmp_path / "out", tokenizer, workers=1)


def test_bytes_that_are_no_text_are_named(tokenizer, tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(CorpusError, match=r"b\.jsonl, line 2: 'utf-8' codec can't decode byte 0xe9"):
        tokenize_files([tmp_path / "b.jsonl"], tmp_path / "c", tokenizer, workers=1)
    text = pyarrow.array([b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "b.parquet")
    with pytest.raises(CorpusError, match=r"b\.parquet: damaged after row 0 of 1: 'utf-8' codec"):
        tokenize_files([tmp_path / "b.parquet"], tmp_path / "c", tokenizer, workers=1)


def test_inputs_that_are_no_files_are_named(tmp_path):
    with pytest.raises(CorpusError, match=r": a directory; give its files, for instance '.*/\*\.jsonl'"):
        expand([tmp_path])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(CorpusError, match=r"\*\.jsonl: no such file"):
        expand([tmp_path / "*.jsonl"])


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


# --- the tokenizer's own word -----------------------------------------------------------------------------------------


def save_words(folder, words: dict[str, int]) -> Tokenizer:
    """A tokenizer of whole words with these ids."""
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, **words}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}')
    return load_tokenizer(folder)


def test_a_vocabulary_with_gaps_keeps_its_ids(tmp_path):
    """Three tokens, one of them 70,000: no 16 bits hold it."""
    words = save_words(tmp_path / "words", {"near": 1, "far": 70_000})
    (tmp_path / "c.jsonl").write_text('{"text": "near far near"}\n')
    manifest = tokenize_files([tmp_path / "c.jsonl"], tmp_path / "c", words, workers=1)
    assert (manifest["dtype"], manifest["max_token_id"], manifest["vocab_size"]) == ("int32", 70_000, 70_001)
    out = np.empty(4, np.int32)
    TokenFile(tmp_path / "c").read(0, out)
    assert out.tolist() == [1, 70_000, 1, 0]


def test_tokens_are_those_of_tokenizer_json(folder, tmp_path):
    """The tokenizer of the corpus, with a class beside it that would split otherwise."""
    shutil.copytree(folder / "tokenizer", tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    manifests = [
        tokenize_files([folder / "plain.jsonl"], tmp_path / name, load_tokenizer(place), workers=1)
        for name, place in [("a", folder / "tokenizer"), ("b", tmp_path / "t")]
    ]
    assert manifests[0] == manifests[1]
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    out = np.empty(manifests[1]["tokens"], np.uint16)
    TokenFile(tmp_path / "b").read(0, out)
    want = [[*theirs.encode(text).ids, 1] for text in [*TEXTS, render_chat(CHAT).text]]
    assert sorted(out.tolist()) == sorted(token for ids in want for token in ids)


def test_what_is_there_is_left_where_it_is_what_was_asked_for(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')

    def ask(**how):
        before = (tmp_path / "c.idx").stat().st_ino if (tmp_path / "c.idx").exists() else None
        manifest = tokenize_files([tmp_path / "a.jsonl"], tmp_path / "c", tokenizer, workers=1, resume=True, **how)
        assert TokenFile(tmp_path / "c").manifest == manifest
        return (tmp_path / "c.idx").stat().st_ino == before

    assert not ask() and ask()
    assert not ask(seed=1) and ask(seed=1)
    assert not ask(seed=1, mask_prompts=True) and ask(seed=1, mask_prompts=True)
    (tmp_path / "c.mask").unlink()
    assert not ask(seed=1, mask_prompts=True)
    (tmp_path / "a.jsonl").write_text('{"text": "two"}\n')
    assert not ask(seed=1, mask_prompts=True)
    (tmp_path / "c.bin").write_bytes(b"cut")
    assert not ask(seed=1, mask_prompts=True)


def test_an_error_in_another_process_names_file_and_line(tokenizer, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(CorpusError, match=r"b\.jsonl, line 2: no text"):
        tokenize_files([tmp_path / "b.jsonl"], tmp_path / "out" / "c", tokenizer, workers=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_resumes_and_says_what_it_replaces(folder, tmp_path):
    """Names that a console would take for markup included."""
    (tmp_path / "[a] b.jsonl").write_text((folder / "plain.jsonl").read_text())
    out = tmp_path / "[red]" / "c"

    def run(*more):
        inputs = [glob.escape(str(tmp_path / "[a] b.jsonl")), "--out", out, "--tokenizer", folder / "tokenizer"]
        result = subprocess.run([sys.executable, TOOL, *inputs, *more], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return next(line for line in result.stderr.splitlines() if "left out" in line)

    line = f"{out}: 61 documents, {{}} tokens, 0 empty documents and 0 blank lines left out"
    first = run()
    assert first == line.format(f"{TokenFile(out).num_tokens:,}")
    assert run() == f"{first}; was there"
    assert run("--seed", "1") == f"{first}; replaces what was there"


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_leaves_nothing_half_written(folder, tmp_path, ending):
    (tmp_path / "long.jsonl").write_bytes(b"".join(LINES) * 80)
    arguments = [tmp_path / "long.jsonl", "--out", tmp_path / "out" / "c", "--tokenizer", folder / "tokenizer"]
    tool = subprocess.Popen(
        [sys.executable, TOOL, *arguments, "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a script in the background ignores it
    )
    spool = tmp_path / "out"
    while not any(path.stat().st_size for path in spool.glob(".tokenize-*/tokens")):
        assert tool.poll() is None
        time.sleep(0.01)
    tool.send_signal(ending)
    _, said = tool.communicate(timeout=60)
    assert tool.returncode == 130 and "Traceback" not in said
    assert said.strip().endswith("tokenize_corpus: interrupted; what was finished stays, the same command resumes")
    assert list(spool.iterdir()) == []


def test_a_models_own_tokenizer_is_not_overwritten(folder, tmp_path, capsys):
    shutil.copytree(folder / "tokenizer", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    arguments = [str(folder / "plain.jsonl"), "--out", str(tmp_path / "c"), "--tokenizer", str(tmp_path / "model")]
    spec = importlib.util.spec_from_file_location("tokenize_corpus", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([*arguments, "--train-bpe", "300"]) == 1
    assert "--train-bpe would overwrite the tokenizer of the model in" in capsys.readouterr().err
