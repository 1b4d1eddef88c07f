"""Large files and directories: whole or not at all, hashed while they are written, synced while they grow."""

import contextlib
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prism_mcore.convert.names import ExchangeError
from prism_mcore.train.manifest import FileRecord, sync_folder

SYNC_BYTES = 256 * 2**20  # the disk is told to begin this often, so that the last sync finds little left
JOBS_BEHIND = 4  # pieces of data that may wait for their hash: what bounds memory


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory that gets its name when the block has ended well, and disappears when it has not.

    Raises ExchangeError where `out` exists, and where the disk is full or cannot be written.
    """
    if out.exists():
        raise ExchangeError(f"{out} exists already; remove it, or write to another directory")
    folder = out.with_name(f".tmp_{out.name}")
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir(parents=True)
        yield folder
        sync_folder(folder)
        os.replace(folder, out)
        sync_folder(out.parent)
    except OSError as error:
        raise ExchangeError(
            f"cannot write {out}: {error}. {_free_space(out.parent)} The unfinished directory was removed"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"The disk of {folder} has {shutil.disk_usage(folder).free / 2**30:.2f} GiB free."


class HashThreads(contextlib.ExitStack):
    """Threads that hash and sync what another one writes; at most JOBS_BEHIND pieces of data wait."""

    def __init__(self, hashes: int = 1):
        super().__init__()
        self.hashers = [self.enter_context(ThreadPoolExecutor(1)) for _ in range(hashes)]
        self.disk = self.enter_context(ThreadPoolExecutor(1))
        self.pending: deque[list[Future]] = deque()
        self.syncing: Future | None = None

    def hash(self, data: Any, *digests: Any) -> None:
        """Update each digest in a thread of its own; `data` must not change before `finish`."""
        self.pending.append(
            [hasher.submit(digest.update, data) for hasher, digest in zip(self.hashers, digests, strict=False)]
        )
        while len(self.pending) > JOBS_BEHIND:
            self._wait()

    def sync(self, descriptor: int) -> None:
        """Begin to bring a file to the disk, unless the disk is still busy with the last one."""
        if self.syncing is None or self.syncing.done():
            self._raise_sync_error()
            self.syncing = self.disk.submit(os.fdatasync, descriptor)

    def finish_hashing(self) -> None:
        """Return when everything is hashed."""
        while self.pending:
            self._wait()

    def finish(self) -> None:
        """Return when everything is hashed and nothing is being synced."""
        self.finish_hashing()
        self._raise_sync_error()

    def _wait(self) -> None:
        for job in self.pending.popleft():
            job.result()

    def _raise_sync_error(self) -> None:
        syncing, self.syncing = self.syncing, None
        if syncing is not None:
            syncing.result()


class HashedFile:
    """A new file; `record` has its size and SHA-256 once it is closed."""

    def __init__(self, path: Path, threads: HashThreads):
        self.threads, self.digest = threads, hashlib.sha256()
        self.size = self.synced = 0
        self.error: OSError | None = None
        self.file = open(path, "wb")  # noqa: SIM115

    def append(self, data: Any, *digests: Any) -> None:
        """Write bytes that will not change, and update these digests, too."""
        self.threads.hash(data, self.digest, *digests)
        self._write(data)

    def write(self, data: Any) -> int:
        """For torch.save, whose buffers are gone when this returns, and which hides the error of a full disk."""
        self.threads.hash(data, self.digest)
        try:
            self._write(data)
        except OSError as error:
            self.error = error
            raise
        finally:
            self.threads.finish_hashing()
        return len(data)

    def flush(self) -> None:
        """For torch.save."""

    def close(self) -> None:
        """Return when everything is on the disk and hashed."""
        try:
            self.threads.finish()
            self.file.flush()
            os.fsync(self.file.fileno())
        finally:
            with contextlib.suppress(OSError):
                self.file.close()

    @property
    def record(self) -> FileRecord:
        """Size and hash."""
        return {"size": self.size, "sha256": self.digest.hexdigest()}

    def _write(self, data: Any) -> None:
        self.file.write(data)
        self.size += len(data)
        if self.size - self.synced >= SYNC_BYTES:
            self.file.flush()
            self.threads.sync(self.file.fileno())
            self.synced = self.size
