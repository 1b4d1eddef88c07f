"""What a person reads: texts of others (prompts, responses, names, paths) are shown as text, never as markup, and
showing them never ends a run."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.errors import ConsoleError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

# What a terminal would obey, what has no encoding, and what reorders the text around it.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def plain(text: object) -> str:
    """A text as characters alone: what a terminal would obey is written out, as in a Python string."""
    return _NOT_TEXT.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def console(*, stderr: bool = False) -> Console:
    """A console for which square brackets, colons and numbers are only text."""
    return Console(file=_stream(stderr), markup=False, emoji=False, highlight=False)


def say(text: object, *, stderr: bool = False) -> None:
    """A line as it is, however long; nobody there to read it is no reason to stop."""
    with contextlib.suppress(OSError):
        print(plain(text), file=_stream(stderr), flush=True)


def show(what: Any, *, stderr: bool = False) -> None:
    """A table: what cannot be shown costs a line that says so, and nothing else."""
    try:
        console(stderr=stderr).print(what)
    except (ConsoleError, ValueError, OSError) as error:
        say(f"not shown: {type(error).__name__}: {error}", stderr=stderr)


def _stream(stderr: bool) -> TextIO:
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks is no reason to stop either
    return stream


def styled(text: object, style: str) -> Text:
    """A text in bold, red and the like, for a console or a table's cell."""
    return Text(plain(text), style=style)


def progress(*columns: ProgressColumn, shown: bool = True) -> Progress:
    """A progress bar on stderr."""
    for column in columns:
        if isinstance(column, TextColumn):
            column.markup = False  # its text is a file's name, perhaps
    return Progress(*columns, console=console(stderr=True), disable=not shown)


@contextlib.contextmanager
def progress_bar(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of one piece of work; gives the function that tells how much more is done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress(*columns, shown=shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda more: bar.advance(task, more)
