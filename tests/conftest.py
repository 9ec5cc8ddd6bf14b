"""What all tests share: one compute thread, golden checkpoints, a private cache directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A busy machine must not fail a test, so no example has a time limit.
settings.register_profile("loci", deadline=None)
settings.load_profile("loci")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
BESIDE = ROOT.parent / "shared" / "golden"


def golden_path(name: str) -> Path:
    """The golden checkpoint `name`, from the repository or from beside it; skips where it is in neither."""
    for folder in (GOLDEN, BESIDE):
        if (folder / name / "config.json").is_file():
            return folder / name
    pytest.skip(f"{name} is neither in tests/golden nor in ../shared/golden")


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models are slowed down by a second thread; built token maps do not touch the user's cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint v41-c that a test may damage."""
    target = tmp_path / "v41-c"
    shutil.copytree(golden_path("v41-c"), target)
    return target
