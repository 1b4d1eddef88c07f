"""Counts the bytes that Triton kernels touch, by running them in Triton's interpreter at reduced sizes.

Hooks on loads, stores, tensor descriptors, block pointers, atomics and products see every address of every program.
Counted per launch: distinct 32-byte sectors read, distinct sectors written (what device memory must move if caches are
perfect), bytes requested by all programs (what it moves if there is no cache) and the FLOPs of products as executed.

    cd benchmarks; TRITON_INTERPRET=1 python -m kernel_bench.traffic < requests.json      # one JSON answer per line
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter as tritons
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from kernel_bench.launches import as_on_hopper
from kernel_bench.op_cases import ROWS, Case
from kernel_bench.peers import prepare
from kernel_bench.works import differentiable
from prism_kernels import interpreter, rows

SECTOR_BITS = 5  # 32 bytes
PENDING = 1 << 22  # sector numbers kept before duplicates are dropped


@dataclass
class Traffic:
    """Of all launches of one kernel within one pass of an op."""

    launches: int = 0
    read: int = 0  # bytes in distinct sectors, summed over launches
    written: int = 0
    requested: int = 0
    product_flops: float = 0.0


class _Sectors:
    """A set of sector numbers that grows by arrays of addresses."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.pending = 0

    def add(self, addresses: np.ndarray) -> None:
        sectors = np.unique(addresses >> np.uint64(SECTOR_BITS))
        self.arrays.append(sectors)
        self.pending += len(sectors)
        if self.pending > PENDING:
            self._merge()
            self.pending = 0

    def _merge(self) -> None:
        self.arrays = [np.unique(np.concatenate(self.arrays))] if self.arrays else []

    @property
    def bytes(self) -> int:
        self._merge()
        return sum(map(len, self.arrays)) << SECTOR_BITS


class Counter:
    """Counts, by kernel name, while its hooks are in place."""

    def __init__(self) -> None:
        self.kernels: dict[str, Traffic] = {}
        self.settings: dict[str, dict[str, Any]] = {}  # compile-time arguments of each kernel's last launch
        self._read, self._written, self._now = _Sectors(), _Sectors(), Traffic()

    def take(self) -> dict[str, Traffic]:
        """What was counted since the last call."""
        kernels, self.kernels = self.kernels, {}
        return kernels

    def touch(self, pointers: Any, mask: Any, sides: tuple[_Sectors, ...]) -> None:
        mask = np.asarray(mask.data if isinstance(mask, TensorHandle) else mask).astype(bool)  # 0 and 1 after `&`
        mask = np.broadcast_to(mask, pointers.data.shape)
        addresses = pointers.data[mask]
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self._now.requested += len(addresses) * width * len(sides)
        for sectors in sides:
            sectors.add(addresses)

    @contextlib.contextmanager
    def launch(self, kernel: InterpretedFunction, kwargs: dict[str, Any]) -> Iterator[None]:
        self._read, self._written, self._now = _Sectors(), _Sectors(), Traffic()
        yield
        total = self.kernels.setdefault(kernel.fn.__name__, Traffic())
        total.launches += 1
        total.read += self._read.bytes
        total.written += self._written.bytes
        total.requested += self._now.requested
        total.product_flops += self._now.product_flops
        self.settings[kernel.fn.__name__] = {k: v for k, v in kwargs.items() if isinstance(v, int | str | float)}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        builder, run = InterpreterBuilder, InterpretedFunction.run
        load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
        swap, modify = builder.create_atomic_cas, builder.create_atomic_rmw

        def counted_run(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
            with self.launch(kernel, kwargs):
                return run(kernel, *args, **kwargs)

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            self.touch(pointers, mask, (self._read,))
            return load(builder, pointers, mask, *rest, **options)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            self.touch(pointers, mask, (self._written,))
            return store(builder, pointers, value, mask, *rest, **options)

        def counted_swap(builder: Any, pointers: Any, *rest: Any) -> Any:
            self.touch(pointers, np.True_, (self._read, self._written))
            return swap(builder, pointers, *rest)

        def counted_modify(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.touch(pointers, mask, (self._read, self._written))
            return modify(builder, operation, pointers, value, mask, *rest)

        def counted_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            self._now.product_flops += 2.0 * a.data.size * b.data.shape[-1]
            return dot(builder, a, b, *rest)

        with (
            mock.patch.object(InterpretedFunction, "run", counted_run),
            mock.patch.object(builder, "create_masked_load", counted_load),
            mock.patch.object(builder, "create_masked_store", counted_store),
            mock.patch.object(builder, "create_atomic_cas", counted_swap),
            mock.patch.object(builder, "create_atomic_rmw", counted_modify),
            mock.patch.object(builder, "create_dot", counted_dot),
            as_on_hopper(),
            _completed(),
        ):
            yield


@contextlib.contextmanager
def _completed() -> Iterator[None]:
    """What peers' kernels need and Triton 3.7's interpreter lacks; the values computed do not matter here."""
    convert = tritons._implicit_cvt

    def with_floats(arg: Any) -> Any:
        if isinstance(arg, float):
            return tl.tensor(TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert(arg)

    def bf16(builder: Any, value: float) -> TensorHandle:
        bits = np.array([value], dtype=np.float32).view(np.uint32) >> 16
        return TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    with (
        mock.patch.object(tritons, "_implicit_cvt", with_floats),
        mock.patch.object(InterpreterBuilder, "get_bf16", bf16, create=True),
        mock.patch.object(libdevice, "rsqrt", lambda x: tl.math.rsqrt(x)),
    ):
        yield


def count(case: Case, tokens: int, side: str, multiprocessors: int) -> dict[str, Any]:
    """{"forward": {kernel: Traffic}, "backward": {...}, "settings": {...}} of our kernel or a peer's, at `tokens`.

    multiprocessors: what launchers of persistent kernels size their grid by.
    """
    counter = Counter()
    rows.multiprocessors.cache_clear()
    rows.MULTIPROCESSORS["cpu"] = multiprocessors
    with counter.counting(), torch.set_grad_enabled(case.phase == "train"), np.errstate(all="ignore"):
        call, leaves = prepare(case, case.build("cpu", tokens), side)
        outputs = call()
        forward, backward = counter.take(), {}
        if leaves:
            results = differentiable(outputs)
            torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results], allow_unused=True)
            backward = counter.take()
    return {
        "forward": {name: asdict(traffic) for name, traffic in forward.items()},
        "backward": {name: asdict(traffic) for name, traffic in backward.items()},
        "settings": counter.settings,
    }


def main() -> None:
    """Answers requests, a JSON list on stdin of {"row", "phase", "shape", "tokens", "side", "multiprocessors"}."""
    requests = json.load(sys.stdin)
    answers = sys.stdout
    sys.stdout = sys.stderr
    named = {row.name: row for row in ROWS}
    if any(request["side"] == "ours" for request in requests):
        interpreter.install()  # peers compute with bf16, which is refused then; their values do not matter here
    for request in requests:
        case = Case(named[request["row"]], request["phase"], request["shape"], request["tokens"])
        try:
            answer = count(case, request["tokens"], request["side"], request["multiprocessors"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
