"""Shared by all tests: `from ranks import run_ranks` works everywhere, and its processes end with the session."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ranks


@pytest.fixture(scope="session", autouse=True)
def _close_rank_pools() -> Iterator[None]:
    yield
    ranks.close_pools()
