"""Lines of JSON: what is read can be written, and a line that cannot is named."""

import json

import pytest

from prism_mcore.json_lines import JsonLines, parse_object


def test_blank_lines_are_skipped_and_counted_and_places_stay_true(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n  \t\n\n{"b": "\xc3\xa9"}')
    file = JsonLines(path)
    lines = list(file)
    assert file.blank == 3 and [(line.number, line.record) for line in lines] == [(2, {"a": 1}), (5, {"b": "é"})]
    with path.open("rb") as raw:
        for line in lines:
            raw.seek(line.offset)
            assert json.loads(raw.readline()) == line.record


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": {"b": [0, "x\\udc00"]}}', r"^a\.b\[1\] holds half a character, the lone surrogate \\udc00"),
        (b'{"a": "\xed\xa0\x80"}', r"a holds .*surrogate \\ud800"),
        (b'{"a": Infinity, "b": NaN}', "a is inf, .*; b is nan"),
        (b'{"a": 1e400}', "a is inf"),
        (b'{"a": "\xff"}', "not JSON: .*utf-8"),
        (b'"a"', 'got "a"|"a"; needed: a JSON object'),
        (b'{"a": 1} {"b": 2}', "not JSON: Extra data"),
    ],
)
def test_what_cannot_be_written_again_is_refused_by_its_place(line, message):
    with pytest.raises(ValueError, match=message):
        parse_object(line)


def test_whole_pairs_are_characters():
    assert parse_object('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
