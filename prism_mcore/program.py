"""What a program of ours does first, before anything that takes seconds to import; the standard library alone.

A process does not outlive the one that started it. A rank whose torchrun was killed would wait for ever in a rendezvous
that nobody answers, and hold its GPU; the kernel therefore kills it with its parent (PR_SET_PDEATHSIG). That comes
before torch is imported, because torchrun may be killed in those seconds, too; and the parent is looked at once more
afterwards, because it may have ended before the kernel was asked.
"""

import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType
from typing import Any

from prism_mcore.exit_codes import STOPPED_BY_SIGNAL

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PARENT = "PRISM_PARENT"  # the process that started this one, if that was one of ours

# (message, module): what megatron-core warns of at import and a dozen times per rank. tools/doctor.py says what is
# installed; the rest is how megatron-core calls torch. Each goes when megatron-core no longer says it.
_EXPECTED_WARNINGS = [
    (r"(Transformer Engine and )?Apex (is|are) not installed", r"megatron\.core"),
    (r"full scope is deprecated", r"megatron\.core\.transformer"),
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core\.optimizer"),
    (
        r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
        r"torch\.distributed",
    ),
]


def begin(resumes: bool = True) -> None:
    """Be killed when torchrun is, if torchrun started this process; see also `expect_warnings` and `_WithoutFuser`.

    torchrun tells its workers TORCHELASTIC_RUN_ID. A program that somebody starts by hand has no such variable and goes
    on when the shell ends, as nohup means it to. resumes: the same command goes on from where this one ends; SIGUSR1,
    by which a job's end is announced, then means code 75, until something catches it that has more to do.
    """
    expect_warnings()
    sys.meta_path.insert(0, _WithoutFuser())
    if resumes:
        signal.signal(signal.SIGUSR1, _stop)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with(os.getppid())
        if os.getppid() == 1 and b"torch" not in _command(1):  # init has adopted it: torchrun was gone before
            os._exit(1)


def record_exit_code(code: int) -> None:
    """Write the code to the file that EXIT_CODE_FILE names, whole or not at all, because torchrun hides it.

    Every rank does: torchrun kills the others when the first has ended.
    """
    if "EXIT_CODE_FILE" in os.environ:
        file = Path(os.environ["EXIT_CODE_FILE"])
        part = file.with_name(f"{file.name}.{os.environ.get('RANK', '0')}")
        part.write_text(f"{code}\n")
        part.replace(file)


def _stop(number: int, frame: FrameType | None) -> None:
    record_exit_code(STOPPED_BY_SIGNAL)
    os._exit(STOPPED_BY_SIGNAL)


class _WithoutFuser(MetaPathFinder):
    """Has megatron_patches' `disable_jit_fuser` done before megatron-core's decorators run, where there is no CUDA.

    They would import torch.compile's compiler, 2.5 of the 4.5 seconds that megatron-core takes, for functions that
    `patch_megatron` makes plain again. Goes with that patch.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "megatron.core.jit":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_disable(module: Any) -> None:
                import torch

                execute(module)
                if not torch.cuda.is_available():
                    module.disable_jit_fuser()

            spec.loader.exec_module = execute_and_disable  # type: ignore[method-assign]
        return spec


def expect_warnings() -> None:
    """Leave them out in this process, unless -W or PYTHONWARNINGS asks for them; importing prism_mcore never does."""
    for message, module in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message, module=module, append=True)


def end_with_parent(parent: int | None = None) -> None:
    """Be killed when `parent` is, by default the process that made this one's `environment()`.

    Does nothing where neither is given: somebody has started it by hand.
    """
    parent = parent or int(os.environ.pop(_PARENT, "0"))
    if parent:
        _end_with(parent)


def environment() -> dict[str, str]:
    """What a process gets that is started here and calls `end_with_parent`. Its parent is the thread that starts it."""
    return {**os.environ, _PARENT: str(os.getpid())}


def _end_with(parent: int) -> None:
    with contextlib.suppress(AttributeError):  # not Linux: there is no such call
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _command(process: int) -> bytes:
    """Its command line; empty where it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""
