"""Shared by all tests: `from ranks import run_ranks` works everywhere, and its processes end with the session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: processes side by side have a core each
    os.environ["OMP_NUM_THREADS"] = "1"
import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():  # before anything imports triton; ranks inherit it
    os.environ.setdefault("TRITON_INTERPRET", "1")

import ranks

from prism_kernels import interpreter


@pytest.fixture(scope="session", autouse=True)
def _bf16_in_the_interpreter() -> None:
    if interpreter.active():
        interpreter.install()


@pytest.fixture(scope="session", autouse=True)
def _close_rank_pools() -> Iterator[None]:
    yield
    ranks.close_pools()
