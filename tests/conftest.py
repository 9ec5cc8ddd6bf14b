"""What all tests share: one compute thread, golden checkpoints, private caches, and no Hub but their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.hub import Hub, serving_hub

# Whatever a test names, the Hub is not asked for it: not here, and not by processes that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"

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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of the test's own and an empty cache, for this process and for those that it starts."""
    from huggingface_hub import constants

    with serving_hub() as own:
        variables = {
            "HF_ENDPOINT": own.url,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", own.url)
        template = own.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as memory.hub has it, come first
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield own
