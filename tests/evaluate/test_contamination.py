"""Questions in token files: found whole, in part or not at all, over borders of blocks, in their own tokenizer."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from prism_mcore.data.token_file import TokenFileWriter
from prism_mcore.evaluate import contamination
from prism_mcore.evaluate.contamination import check_files, overlaps, report
from prism_mcore.text import Tokenizer

N = 5


def corpus(folder, documents, dtype=np.uint16, **manifest):
    prefix = folder / "corpus"
    with TokenFileWriter(prefix, dtype) as writer:
        writer.manifest |= manifest
        for document in documents:
            writer.add(np.array(document), np.array([len(document)]))
    return str(prefix)


@pytest.mark.parametrize("block", [contamination.BLOCK, 64, 7])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_every_share_is_that_of_a_direct_search(tmp_path, monkeypatch, block, dtype):
    monkeypatch.setattr(contamination, "BLOCK", block)
    random = np.random.default_rng(0)
    documents = [random.integers(0, 30, length).tolist() for length in (200, 3, 77, 400)]
    questions = {
        "whole": documents[0][20:60],
        "end": documents[3][-9:],
        "half": documents[2][:20] + [99] * 20,
        "chance": random.integers(0, 30, 40).tolist(),
        "none": [99] * 12,
        "short": [1, 2, 3],
        "nothing": [],
    }
    stream = [token for document in documents for token in document]
    held = {tuple(stream[i : i + N]) for i in range(len(stream) - N + 1)}
    read = []
    found = overlaps(questions, [corpus(tmp_path, documents, dtype)], N, read.append)
    for name, tokens in questions.items():
        grams = [tuple(tokens[i : i + N]) for i in range(len(tokens) - N + 1)]
        assert found[name] == (sum(gram in held for gram in grams) / len(grams) if grams else None), name
    assert found["whole"] == found["end"] == 1.0 and 0.4 < found["half"] < 0.5 and sum(read) == len(stream)
    said = report(found, N, 0.45 if found["half"] > 0.45 else 0.4)
    assert set(said["hits"]) == {"whole", "end", "half"} and said["too_short"] == ["nothing", "short"]


def test_equal_hashes_are_looked_at_again(tmp_path, monkeypatch):
    """Were all hashes equal, only true matches would still be found, at the first place that has the hash."""
    monkeypatch.setattr(contamination, "_hashes", lambda grams: np.zeros(len(grams), np.uint64))
    path = corpus(tmp_path, [list(range(40))])
    assert overlaps(
        {
            "in": [3, 4, 5, 6, 7],
        },
        [path],
        N,
    ) == {"in": 1.0}
    assert overlaps({"out": [3, 4, 5, 7, 6]}, [path], N) == {"out": 0.0}


def test_a_file_of_another_tokenizer_is_refused(tmp_path):
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")), source="models/x")
    path = corpus(tmp_path, [[1, 2]], tokenizer_sha256="0" * 64)
    with pytest.raises(ValueError, match="was tokenized with another tokenizer than models/x"):
        check_files([path], tokenizer)
    manifest = json.loads((tmp_path / "corpus.json").read_text()) | {"tokenizer_sha256": tokenizer.sha256}
    (tmp_path / "corpus.json").write_text(json.dumps(manifest))
    assert check_files([path], tokenizer) == 2
