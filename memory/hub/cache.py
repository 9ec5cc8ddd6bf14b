"""The Hub's cache on this machine: which models are there, whole, and since when nobody used them.

The layout is huggingface_hub's, shared with every program that uses it: `models--ORG--MODEL` with `refs/`
(revision -> commit), `snapshots/COMMIT/` (links by name) and `blobs/` (files by hash). Nothing here touches
the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CachedFileInfo,
    CachedRepoInfo,
    CachedRevisionInfo,
    DeleteCacheStrategy,
    constants,
    scan_cache_dir,
)
from huggingface_hub.errors import CacheNotFound

from memory.checkpoint.gguf_files import architecture_of
from memory.checkpoint.safetensors_files import weight_files
from memory.hub.names import MAIN, HubModel
from memory.hub.selection import TOKENIZERS, chosen_gguf, gguf_models, is_whole
from memory.user_files import whole_file
from quant.errors import CheckpointError, ConfigError

COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT = 8  # digits of a commit that people are shown
MAX_REF_BYTES = 1024
MAX_CONFIG_BYTES = 16 << 20


def cache_folder() -> Path:
    """Where models of the Hub are kept: HF_HUB_CACHE, or `hub` in HF_HOME, or `~/.cache/huggingface/hub`."""
    return Path(constants.HF_HUB_CACHE)


def repo_folder(model: HubModel) -> Path:
    """Where a model's repository is kept."""
    return cache_folder() / f"models--{model.repo.replace('/', '--')}"


def snapshot_folder(model: HubModel, commit: str) -> Path:
    """Where the files of a commit are, by name."""
    return repo_folder(model) / "snapshots" / commit


def cached_commit(model: HubModel) -> str | None:
    """The commit that the model's revision was when it was last downloaded; None if it never was."""
    if COMMIT.fullmatch(model.revision):
        return model.revision
    ref = repo_folder(model) / "refs" / model.revision
    if not ref.is_file() or ref.stat().st_size > MAX_REF_BYTES:
        return None
    commit = ref.read_text(errors="replace").strip()
    return commit if COMMIT.fullmatch(commit) else None


def note_commit(model: HubModel, commit: str) -> None:
    """Record that the model's revision is `commit`, all files of which are here."""
    if model.revision != commit:
        ref = repo_folder(model) / "refs" / model.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(ref) as temporary:
            temporary.write_text(commit)


def cached_path(model: HubModel) -> Path | None:
    """The model's directory or GGUF file in the cache; None where not all of it is there."""
    commit = cached_commit(model)
    snapshot = snapshot_folder(model, commit) if commit else None
    if snapshot is None or not snapshot.is_dir():
        return None
    if model.part is None and _has_all_weights(snapshot):
        return snapshot
    files = chosen_gguf(model, gguf_models(_names(snapshot)))
    if files and is_whole(files):
        return snapshot / files[0]
    return None


def _has_all_weights(snapshot: Path) -> bool:
    has_rest = (snapshot / "config.json").is_file() and any(
        (snapshot / name).is_file() for name in TOKENIZERS
    )
    try:
        return has_rest and all((snapshot / name).is_file() for name in weight_files(snapshot))
    except CheckpointError:
        return False


def _names(snapshot: Path) -> list[str]:
    return [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*.gguf") if file.is_file()]


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache: one revision of a repository, or a GGUF file of one.

    commits and branches that point to it are in `revision`; model_type is empty where it is not known;
    last_used, seconds since 1970, is when its weights were last read, as the file system noted it.
    """

    name: str
    revision: str
    nbytes: int
    last_used: float
    model_type: str
    is_whole: bool


def cached_models() -> list[CachedModel]:
    """The models in the cache, by name: all that have safetensors or GGUF files."""
    found = [
        item
        for repo in _repositories()
        for revision in repo.revisions
        for item in _models_of(repo.repo_id, revision)
    ]
    return sorted(found, key=lambda item: (item.name.lower(), item.revision))


def _repositories() -> Iterable[CachedRepoInfo]:
    try:
        return [repo for repo in scan_cache_dir(cache_folder()).repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []


def _models_of(repo: str, revision: CachedRevisionInfo) -> Iterable[CachedModel]:
    snapshot = revision.snapshot_path
    files = {file.file_path.relative_to(snapshot).as_posix(): file for file in revision.files}
    refs = sorted(revision.refs, key=lambda ref: (ref != MAIN, ref))
    at = "" if MAIN in refs or not refs else f"@{refs[0]}"
    if not refs:
        at = f"@{revision.commit_hash}"
    shown = " ".join([*refs, revision.commit_hash[:SHORT]])
    if any(name.endswith(".safetensors") and "/" not in name for name in files):
        yield CachedModel(
            f"{repo}{at}", shown, _size(files.values()), _last_used(files.values()),
            _model_type(snapshot / "config.json"), _has_all_weights(snapshot),
        )  # fmt: skip
    for name, parts in gguf_models(files).items():
        own = [files[part] for part in parts]
        yield CachedModel(
            f"{repo}{at}:{name}", shown, _size(own), _last_used(own),
            architecture_of(snapshot / parts[0]) or "", is_whole(parts),
        )  # fmt: skip


def _size(files: Iterable[CachedFileInfo]) -> int:
    return sum({file.blob_path: file.size_on_disk for file in files}.values())


def _last_used(files: Iterable[CachedFileInfo]) -> float:
    """When weights were last read: small files are read by whoever asks what a model is."""
    weights = [file for file in files if file.file_name.endswith((".safetensors", ".gguf"))]
    return max(max(file.blob_last_accessed, file.blob_last_modified) for file in weights)


def _model_type(config: Path) -> str:
    try:
        if config.stat().st_size > MAX_CONFIG_BYTES:
            return ""
        value = json.loads(config.read_bytes())
        return str(value.get("model_type", "")) if isinstance(value, dict) else ""
    except (OSError, ValueError, RecursionError):
        return ""


def removal(model: HubModel) -> DeleteCacheStrategy:
    """What removing `model` would delete: its GGUF file, its revision, or its repository with all of them.

    Raises ConfigError where it is not in the cache.
    """
    if not cache_folder().is_dir():
        raise ConfigError(f"{model} is not in {cache_folder()}, which does not exist")
    cache = scan_cache_dir(cache_folder())
    repo = next(
        (repo for repo in cache.repos if repo.repo_type == "model" and repo.repo_id == model.repo), None
    )
    if repo is None:
        raise ConfigError(f"{model} is not in {cache_folder()}; `loci list` shows what is")
    revisions = list(repo.revisions)
    if model.revision != MAIN or model.part:
        revisions = [r for r in revisions if model.revision in r.refs or r.commit_hash == model.revision]
    if model.part is None and revisions:
        return cache.delete_revisions(*(revision.commit_hash for revision in revisions))
    for revision in revisions:
        files = {
            file.file_path.relative_to(revision.snapshot_path).as_posix(): file for file in revision.files
        }
        ggufs = gguf_models(files)
        chosen = chosen_gguf(model, ggufs)
        if chosen and len(ggufs) == 1 and not any(name.endswith(".safetensors") for name in files):
            return cache.delete_revisions(revision.commit_hash)
        if chosen:
            return cache.delete_files(*(files[name] for name in chosen))
    raise ConfigError(f"{model} is not in {cache_folder()}; `loci list` shows what is")
