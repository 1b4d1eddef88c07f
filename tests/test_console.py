"""Texts of others are shown as they are, and showing them never ends a run."""

import io
import re
import sys
from pathlib import Path

import pytest
from rich.progress import TextColumn
from rich.table import Table

from prism_mcore.console import console, plain, progress, say, show

FOREIGN = r"Solve \[x^2\] [/x] [bold]now[/bold] :smile: [link=a]b"


@pytest.mark.parametrize("text", [FOREIGN, "[", r"\[", r"ends with \\", "[/]", "[@click=f]x"])
def test_markup_of_others_is_text(text, capsys):
    table = Table("column", title=text)
    table.add_row(text)
    show(table)
    say(text)
    assert capsys.readouterr().out.count(text) == 3


def test_a_terminal_obeys_nothing_of_it():
    assert plain("a\x1b[2Jb\x07\x85\u202ec\ud800") == r"a\x1b[2Jb\x07\x85\u202ec\ud800"
    assert plain("tabs\tand\nlines stay, so do é and 😀") == "tabs\tand\nlines stay, so do é and 😀"


def test_letters_that_the_terminal_lacks_are_written_out(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("x² [/x] \udcff")
    console().print("é")
    sys.stdout.flush()
    assert raw.getvalue() == b"x\\xb2 [/x] \\udcff\n\\xe9\n"


def test_every_program_shows_texts_through_this_console():
    root = Path(__file__).parents[1]
    files = [path for folder in ("prism_mcore", "launch", "tools") for path in (root / folder).rglob("*.py")]
    own = {path.name: re.findall(r"\bConsole\(|\bProgress\(|from_markup", path.read_text()) for path in files}
    assert {name for name, found in own.items() if found} == {"console.py"}


def test_a_file_name_in_a_progress_bar_is_text(capsys):
    with progress(TextColumn("{task.description}")) as shows:
        shows.add_task(FOREIGN, total=1)
    assert capsys.readouterr().err.strip() == FOREIGN


def test_what_cannot_be_shown_costs_a_line(capsys):
    class Broken:
        def __rich_console__(self, console, options):
            raise ValueError("what is this?")

    show(Broken())
    assert capsys.readouterr().out == "not shown: ValueError: what is this?\n"
