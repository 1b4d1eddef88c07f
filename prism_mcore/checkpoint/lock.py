"""Exclusive use of a folder or a file: a lock that names its holder and dies with it."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

log = logging.getLogger(__name__)

PATIENCE_S = 5.0  # a holder that is just being ended, before a requeued job, gets so long
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUse(RuntimeError):
    """Another process has the lock; the message says which, on which host, and since when."""


@contextmanager
def exclusive(path: Path, patience_s: float = PATIENCE_S, *, what: Path | None = None) -> Iterator[None]:
    """Inside, this process alone has the lock of the file `path`, which is made where it is missing.

    what: the file or folder that it guards, for messages; by default the one that `path` is in.

    The kernel takes the lock back when its holder ends, however it ends: a file left behind blocks nobody. It is flock,
    which Linux passes on to the server of an NFS folder, so that another node's holder is seen, too; where the file
    system has no locks, a warning says so. Raises InUse after patience_s, and OSError where the file cannot be written.
    """
    with path.open("a+", encoding="utf-8") as file:
        _take(file.fileno(), path, what or path.parent, time.monotonic() + patience_s)
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, file)
        file.flush()
        yield


def _take(descriptor: int, path: Path, what: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise InUse(f"{what} is in use by {_holder(path)}") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return log.warning("%s cannot be locked (%s): nothing keeps two runs apart", path, error.strerror)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has only just taken it
        return "another process"
