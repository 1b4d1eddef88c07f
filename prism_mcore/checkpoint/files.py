"""Large files: read ahead, and hashed while they are written past the page cache."""

import contextlib
import errno
import fcntl
import hashlib
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from prism_mcore.checkpoint.durable import FileRecord

BLOCK_BYTES = 8 * 2**20  # read, hashed and written at once
BLOCKS_WAITING = 4  # for their hash or for the disk: what bounds memory

T = TypeVar("T")
OnBytes = Callable[[int], None]  # told of bytes that were read or written


class Buffers:
    """Memory for blocks, used again in turn: fresh pages from the kernel would cost more than reading into them.

    What was taken stays valid until `count` more were taken.
    """

    def __init__(self, count: int):
        self.count = count
        self.buffers: deque[Tensor] = deque()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        buffer = self.buffers.popleft() if len(self.buffers) > self.count else torch.empty(0, dtype=torch.uint8)
        if buffer.numel() < size:
            buffer = torch.empty(max(size, BLOCK_BYTES), dtype=torch.uint8)
        self.buffers.append(buffer)
        return buffer[:size].view(dtype).view(tuple(shape))


def read_ahead(reads: Iterable[Callable[[], T]]) -> Generator[T]:
    """The result of every call, the next one running in a thread while the last one is used."""
    with ThreadPoolExecutor(1) as thread:
        following: deque[Future[T]] = deque()
        for read in reads:
            following.append(thread.submit(read))
            if len(following) > 1:
                yield following.popleft().result()
        while following:
            yield following.popleft().result()


class Workers(contextlib.ExitStack):
    """One thread that writes, one that hashes files and one that hashes tensors, and the blocks between them."""

    def __init__(self) -> None:
        super().__init__()
        self.disk, self.files, self.tensors = (self.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        self.tensor_jobs: deque[Future] = deque()
        aligned = (memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(BLOCKS_WAITING + 1))
        self.blocks = deque([(block, list[Future]()) for block in aligned])

    def hash_tensor(self, digest: Any, data: Any) -> None:
        """Update a tensor's digest; `data` must stay until BLOCKS_WAITING more were given."""
        self.tensor_jobs.append(self.tensors.submit(digest.update, data))
        while len(self.tensor_jobs) > BLOCKS_WAITING:
            self.tensor_jobs.popleft().result()

    def free_block(self) -> memoryview:
        """Aligned memory that was written and hashed if it was ever used."""
        block, jobs = self.blocks.popleft()
        for job in jobs:
            job.result()
        return block

    def put(self, block: memoryview, write: Callable[[], None], hash_: Callable[[], None]) -> None:
        """Do both with a block, each in its thread, and then let it be used again."""
        self.blocks.append((block, [self.disk.submit(write), self.files.submit(hash_)]))

    def finish(self) -> None:
        """Return when all is written and hashed."""
        while self.tensor_jobs:
            self.tensor_jobs.popleft().result()
        for _, jobs in self.blocks:
            while jobs:
                jobs.pop().result()


class HashedFile:
    """A new file; `record` has its size and SHA-256 once it is closed. One at a time for the same workers.

    Written past the page cache where the file system can (O_DIRECT): that leaves the processor to the hashes, and
    memory to others. Filling the cache took 0.5 to 5 s where hashing took 1.5 s, for 2.5 GB on a virtual machine.
    """

    def __init__(self, path: Path, workers: Workers):
        self.workers, self.digest = workers, hashlib.sha256()
        self.size = self.filled = 0
        self.error: OSError | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self.descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.descriptor = os.open(path, flags & ~os.O_EXCL, 0o666)
        self.block = workers.free_block()

    def append(self, data: memoryview | bytes, digest: Any = None) -> None:
        """Write bytes, which with a digest to be updated, too, must stay for a while (`Workers.hash_tensor`)."""
        if digest is not None:
            self.workers.hash_tensor(digest, data)
        for start in range(0, len(data), BLOCK_BYTES):
            self._stage(data[start : start + BLOCK_BYTES])

    def write(self, data: Any) -> int:
        """For torch.save, which hides the error of a full disk."""
        try:
            self.append(memoryview(data))
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """For torch.save."""

    def close(self) -> None:
        """Return when everything is on the disk and hashed."""
        try:
            self.workers.finish()
            write_through_cache(self.descriptor)  # what is left fills no whole sector
            rest = self.block[: self.filled]
            write_all(self.descriptor, rest, self.size - self.filled)
            self.digest.update(rest)
            os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)
            self.workers.blocks.append((self.block, []))

    @property
    def record(self) -> FileRecord:
        """Size and hash."""
        return {"size": self.size, "sha256": self.digest.hexdigest()}

    def _stage(self, data: memoryview | bytes) -> None:
        """Copy at most a block's bytes, and hand over the block that they fill."""
        room = BLOCK_BYTES - self.filled
        first, rest = data[:room], data[room:]
        self.block[self.filled : self.filled + len(first)] = first
        self.filled += len(first)
        self.size += len(first)
        if self.filled == BLOCK_BYTES:
            block, start = self.block, self.size - BLOCK_BYTES
            self.workers.put(block, lambda: write_all(self.descriptor, block, start), lambda: self.digest.update(block))
            self.filled, self.block = 0, self.workers.free_block()
            self._stage(rest)


def write_all(descriptor: int, data: Any, start: int) -> None:
    """Write all of some bytes at a place of a file."""
    view, done = memoryview(data), 0
    while done < len(view):
        try:
            done += os.pwrite(descriptor, view[done:], start + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not write_through_cache(descriptor):
                raise


def write_through_cache(descriptor: int) -> bool:
    """Give up O_DIRECT, for bytes that its alignment does not allow; false where there is none to give up."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)


def read_exactly(descriptor: int, start: int, out: Tensor) -> bool:
    """Fill a contiguous tensor with the bytes of an open file from `start` on; false where the file ends before."""
    data = as_bytes(out)
    done = 0
    while done < len(data):
        count = os.preadv(descriptor, [data[done:]], start + done)
        if count == 0:
            return False
        done += count
    return True


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
