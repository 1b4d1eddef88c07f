"""What is installed, on what devices, and which backend each op will use, and why: `python tools/doctor.py`.

Settings that a recipe would make can be tried: `python tools/doctor.py kernels.ssd_scan=mamba_ssm`. The exit code is 0
where every op has a backend, 1 where a required package is missing, 2 where an override cannot be obeyed.
"""

import argparse
import os
import platform
import sys
from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table
from rich.text import Text

from prism_kernels.backends import SelectedBackend, missing_module, select, why_not
from prism_kernels.table import BACKENDS, OPS
from prism_mcore.console import say, show, styled
from prism_mcore.rewards.sandbox import Sandbox, SandboxError

# distribution -> what it is for
REQUIRED = {
    "torch": "the engine",
    "megatron-core": "parallel linears, schedules, distributed optimizer",
    "numpy": "the data path",
    "psutil": "memory; saving checkpoints",
    "safetensors": "Hugging Face files",
    "tokenizers": "tokenizers",
    "transformers": "chat templates, the parity oracle",
    "pydantic": "settings",
    "PyYAML": "recipes",
    "rich": "the console",
    "tensorboard": "curves",
    "matplotlib": "pictures",
    "einops": "the distributed optimizer with several instances",
    "pyarrow": "parquet corpora",
    "zstandard": ".jsonl.zst corpora",
}
# distribution -> (what it is for, what happens without it)
OPTIONAL = {
    "triton": ("our kernels", "plain torch"),
    "transformer-engine": ("linears, norms, attention, FusedAdam", "megatron-core's linears, our kernels"),
    "flash-attn": ("attention where Transformer Engine is absent", "our kernel"),
    "mamba-ssm": ("another scan", "our kernel"),
    "causal-conv1d": ("another convolution", "our kernel"),
    "apex": ("FusedAdam where Transformer Engine is absent", "our kernel"),
    "math-verify": ("math rewards", "they are refused"),
    "reasoning-gym": ("demo tasks", "they are refused"),
    "pyseccomp": ("the sandbox of the code reward", "it is refused"),
}
# distribution -> the backend that calls it
BACKEND_OF = {
    "triton": "triton",
    "transformer-engine": "te",
    "flash-attn": "flash_attn",
    "mamba-ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
    "apex": "apex",
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    try:
        selected = select(_overrides(options.overrides), device)
    except ValueError as error:
        say(f"doctor: {error}", stderr=True)
        return 2
    for table in (_devices(), _packages(), _sandbox(), _backends(device), _ops(selected, device)):
        show(table)
    missing = [name for name in REQUIRED if _version(name) is None]
    if missing:
        say(f"doctor: missing {', '.join(missing)}; pip install -e . installs them", stderr=True)
    return 1 if missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=found, help="choose as on this device (%(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="kernels.OP=BACKEND", help="as in a recipe")
    return parser


def _overrides(arguments: list[str]) -> dict[str, str]:
    pairs = [argument.removeprefix("kernels.").partition("=") for argument in arguments]
    for argument, (_, equals, _) in zip(arguments, pairs, strict=True):
        if not equals or not argument.startswith("kernels."):
            raise ValueError(f"{argument!r} is not of the form kernels.OP=BACKEND")
    return {op: backend for op, _, backend in pairs}


def _devices() -> Table:
    table = Table("device", "memory", "", title="Devices")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        known = f"sm_{card.major}{card.minor}, {card.multi_processor_count} multiprocessors"
        table.add_row(f"cuda:{i} {card.name}", f"{card.total_memory / 2**30:.0f} GiB", known)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    table.add_row(f"cpu {platform.machine()}", f"{memory:.0f} GiB", cores)
    return table


def _packages() -> Table:
    table = Table("package", "version", "for", "without it", title="Packages")
    for name, purpose in REQUIRED.items():
        table.add_row(name, _version(name) or styled("missing", "red"), purpose, "nothing works")
    for name, (purpose, without) in OPTIONAL.items():
        table.add_row(name, _optional_version(name), purpose, without)
    return table


def _sandbox() -> Table:
    """What holds programs that a model wrote: each recipe is opened, and tried from inside."""
    table = Table("recipe", "here", title="Sandbox for programs (the code reward takes the first that holds)")
    for recipe in ("bubblewrap", "landlock"):
        try:
            Sandbox(recipe=recipe).close()
            table.add_row(recipe, "holds")
        except SandboxError as error:
            table.add_row(recipe, styled(error, "yellow"))
    return table


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _optional_version(distribution: str) -> str | Text:
    """Its version; where the module that is called is not in it (PyPI's apex is another package), that, too.

    And where megatron-core, which calls it, was written for others.
    """
    version, backend = _version(distribution), BACKEND_OF.get(distribution)
    if version is None:
        return styled("-", "dim")
    if module := missing_module(backend) if backend else None:
        return styled(f"{version}, without {module}", "yellow")
    named = _named_by_megatron(distribution)
    if named is None or named.contains(version, prereleases=True):
        return version
    return styled(f"{version}, outside the range megatron-core names: {named}", "yellow")


def _named_by_megatron(distribution: str) -> SpecifierSet | None:
    """The versions that megatron-core's metadata declare."""
    if _version("megatron-core") is None:
        return None
    declared = map(Requirement, metadata.requires("megatron-core") or [])
    return next((one.specifier for one in declared if one.name == distribution), None)


def _backends(device: torch.device) -> Table:
    table = Table("backend", "here", title=f"Backends on {device.type}")
    for backend in BACKENDS:
        why = why_not(backend, device)
        table.add_row(backend, "yes" if why is None else styled(why, "dim"))
    return table


def _ops(selected: dict[str, SelectedBackend], device: torch.device) -> Table:
    title = f"Ops on {device.type} (dim: not here; same bits: a token's result does not depend on its batch)"
    table = Table("op", "backend", "why", "others", "same bits", title=title)
    for op, backend in selected.items():
        others = [
            styled(other, "" if why_not(other, device) is None else "dim")
            for other in OPS[op].backends
            if other != backend.name
        ]
        same = "yes" if backend.batch_invariant else "no"
        table.add_row(op, backend.name, backend.reason, Text(", ").join(others), same)
    return table


if __name__ == "__main__":
    sys.exit(main())
