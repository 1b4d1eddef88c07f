"""What a Triton launcher would compile and run on a Hopper GPU, found and compiled on a machine without one.

`recorded()` runs launchers on meta tensors. Triton's own launcher runs unchanged up to the point where it would
compile: its binder derives types, specialised integers and divisibility, exactly as on a GPU, and what it would compile
is written down instead. `compile_launch` compiles that for sm_90 and reads registers, spills and matrix instructions.
"""

import contextlib
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132  # of an H100 SXM and an H200, for launchers that size their grid by it
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Launch:
    """One kernel launch: what Triton compiles it from, and its grid."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    grid: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def settings(self) -> dict[str, Any]:
        """Its compile-time arguments by name."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}

    @functools.cached_property
    def key(self) -> str:
        """Equal where the compiled code is."""
        return repr(
            (self.kernel.cache_key, self.signature, self.constants, self.attributes, sorted(self.options.items()))
        )


@dataclass
class TorchOp:
    """One torch operation that runs a kernel of its own between launches: bytes in and out, FLOPs of a product."""

    name: str
    bytes: int
    flops: float


@dataclass
class Record:
    launches: list[Launch] = field(default_factory=list)
    torch_ops: list[TorchOp] = field(default_factory=list)


class _Hopper:
    """What Triton asks its driver for before it compiles, answered as on an H100."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Within it, launches on meta tensors and the torch operations around them are written down, not run."""
    record = Record()
    launcher = JITFunction.run
    grids: list[Any] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        grids.append((grid, args, kwargs))
        try:
            return launcher(self, *args, grid=grid, warmup=warmup, **kwargs)
        finally:
            grids.pop()

    def write_down(self, key, signature, device, constants, options, attributes, warmup):
        grid, args, kwargs = grids[-1]
        if callable(grid):
            bound_args, _, _ = self.device_caches[device][4](*args, **kwargs)
            grid = grid(bound_args)
        record.launches.append(Launch(self, signature, constants, attributes, dict(options.__dict__), tuple(grid)))

    before = driver._active
    driver.set_active(_Hopper())
    try:
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(JITFunction, "_do_compile", write_down),
            as_on_hopper(),
            _TorchOps(record.torch_ops),
        ):
            yield record
    finally:
        driver._active = before


@contextlib.contextmanager
def reading_values() -> Iterator[None]:
    """For peers that wait for a number on the GPU: on meta tensors it is 1, and equal to any."""
    item = torch.Tensor.item
    with (
        mock.patch.object(torch.Tensor, "item", lambda self: 1 if self.device.type == "meta" else item(self)),
        mock.patch.object(torch, "equal", lambda x, y: True),
    ):
        yield


@contextlib.contextmanager
def as_on_hopper() -> Iterator[None]:
    """What launchers ask about the device is answered as on an H100; autotuners take their first configuration."""
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, major=9, minor=0, name="sm_90")
    with (
        mock.patch.object(Autotuner, "run", first_config),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        mock.patch.object(torch.cuda, "device", lambda device=None: contextlib.nullcontext()),
    ):
        yield


def first_config(tuner: Autotuner, *args: Any, **kwargs: Any) -> Any:
    """The first of a peer's configurations, in place of its autotuner: which is fastest only a GPU can tell."""
    config = tuner.best_config = tuner.configs[0]
    if config.pre_hook is not None:
        config.pre_hook({**dict(zip(tuner.arg_names, args, strict=False)), **kwargs, **config.all_kwargs()})
    return tuner.fn.run(*args, **kwargs, **config.all_kwargs())


class _TorchOps(TorchDispatchMode):
    """Writes down every torch operation that reads or writes memory."""

    def __init__(self, found: list[TorchOp]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__ in FREE:
            return out
        name = func.overloadpacket.__name__.removesuffix("_")
        inputs = () if name in WRITES else args[1:] if name == "copy" else args  # never what out= names
        tensors = [x for x in torch.utils._pytree.tree_leaves((inputs, out)) if isinstance(x, torch.Tensor)]
        moved = sum(x.numel() * x.element_size() for x in tensors if x.device.type == "meta")
        if moved:
            flops = 0.0
            if name in PRODUCTS:
                a, b = (args[i] for i in PRODUCTS[name])
                flops = 2.0 * a.numel() * b.shape[-1]
            self.found.append(TorchOp(name, moved, flops))
        return out


PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}  # which arguments are the matrices
# Operations that read nothing of what they are given, and those that touch no memory.
WRITES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill", "zero"}
FREE = {
    "detach",
    "detach_",
    "alias",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "set_",
}


# --------------------------------------------------------------------------------------------------------- compiling


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a launch."""

    registers: int  # per thread
    spills: int  # local loads and stores in the machine code, and bytes of stack
    shared_bytes: int
    warps: int
    wgmma: int  # products that became Hopper's warp-group instruction
    other_products: list[str]  # products with at least 64 rows that did not
    wide_loads: float  # share of global load and store instructions that move 16 bytes per thread, TMA left out


def compile_launch(launch: Launch) -> Compiled:
    """Compile for sm_90 (Triton keeps the result on disk) and read the machine code."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    kernel = triton.compile(source, target=TARGET, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (_tool("cuobjdump", option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass, re.M)
    spills = sum(name.split(".")[0] in ("STL", "LDL") for name in instructions)
    transfers = [name for name in instructions if name.split(".")[0] in ("LDG", "STG", "LDGSTS")]
    ttgir = kernel.asm["ttgir"]
    return Compiled(
        registers=registers,
        spills=spills + stack,
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        wgmma=len(re.findall(r"ttng\.warp_group_dot ", ttgir)),
        other_products=_products_without_wgmma(ttgir),
        wide_loads=sum("128" in name.split(".") for name in transfers) / max(1, len(transfers)),
    )


def _tool(name: str, *arguments: str) -> str:
    environment = os.environ | {"PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [str(BINARIES / name), *arguments], capture_output=True, text=True, check=True, env=environment
    ).stdout


def _products_without_wgmma(ttgir: str) -> list[str]:
    """Products of at least 64 rows that ended as another instruction, as "128x64 * 64x128 bf16"."""
    found = []
    for line in re.findall(r"= tt\.dot .*", ttgir):
        a, b = re.findall(r"tensor<([0-9x]+)x([a-z]+[0-9]*)", line)[:2]
        if int(a[0].split("x")[-2]) >= 64:
            found.append(f"{a[0]} * {b[0]} {a[1]}")
    return found
