"""Fetching what the corpus is made of, through the package managers' own clients."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def fetch(directory: Path) -> tuple[Path, Path]:
    """(wheel of `chitchat-dataset`, package `wordnet-base`), downloaded into `directory` unless there.

    Raises SystemExit with what to do where a client is missing or fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wheel = _present(directory, "chitchat_dataset-*.whl") or _download(
        [sys.executable, "-m", "pip", "download", "--no-deps", "chitchat-dataset==0.9.0"],
        directory,
        "chitchat_dataset-*.whl",
    )
    package = _present(directory, "wordnet-base_*.deb") or _download(
        ["apt-get", "download", "wordnet-base"], directory, "wordnet-base_*.deb"
    )
    return wheel, package


def _present(directory: Path, pattern: str) -> Path | None:
    return next(iter(sorted(directory.glob(pattern))), None)


def _download(command: list[str], directory: Path, pattern: str) -> Path:
    advice = f"put a file {pattern} into {directory} by hand and start again"
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not on this machine; {advice}")
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    found = _present(directory, pattern)
    if found is None:
        raise SystemExit(f"`{' '.join(command)}` failed; {advice}\n{done.stderr.strip()[-500:]}")
    return found
