"""Downloads from a Hub: what is fetched, what is not fetched twice, and what goes wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from memory.hub import download as downloading
from memory.hub.cache import cached_path, snapshot_folder
from memory.hub.download import check_room, download, missing_bytes
from memory.hub.names import HubModel
from memory.hub.remote import Listing, look_up
from memory.hub.stand_in import stand_in
from quant.errors import BudgetError, ConfigError, LociError
from tests.conftest import golden_path
from tests.hub import Hub, files_of

MODEL = HubModel("org/model")
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = sorted(["config.json", "model.safetensors.index.json", "tokenizer.json", *SHARDS])


@pytest.fixture
def files() -> dict[str, bytes]:
    """A V4.1 checkpoint with much beside it that is not needed."""
    more = {"pytorch_model.bin": b"pickle" * 999, "modeling_x.py": b"import os", "README.md": b"#"}
    return files_of(golden_path("v41-c")) | more


def needed(listing: Listing) -> dict[str, int]:
    with stand_in(listing) as standing:
        return standing.files


def fetch(model: HubModel = MODEL) -> Path:
    listing = look_up(model)
    return download(listing, needed(listing), lambda done, total: None)


def test_what_is_needed_arrives_and_nothing_else(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("org/model", files)
    seen: list[tuple[int, int]] = []
    listing = look_up(MODEL)

    snapshot = download(listing, needed(listing), lambda *progress: seen.append(progress))

    assert sorted(hub.fetched()) == NEEDED
    assert {file.name: file.read_bytes() for file in snapshot.iterdir()} == {n: files[n] for n in NEEDED}
    total = sum(len(files[name]) for name in NEEDED)
    assert seen[-1] == (total, total)
    assert cached_path(MODEL) == snapshot
    assert missing_bytes(listing, needed(listing)) == 0


@pytest.mark.slow
def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # a whole chunk is what counts as arrived
    hub.add("org/model", files).breaks[SHARDS[0]] = 1_000_000

    snapshot = fetch()

    assert (snapshot / SHARDS[0]).read_bytes() == files[SHARDS[0]]
    spans = [span for _, path, span in hub.requests if path.endswith(SHARDS[0]) and span.endswith("-")]
    assert spans == ["bytes=1000000-"]


def test_an_interrupted_download_goes_on_with_what_is_missing(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", files)
    listing = look_up(MODEL)
    wanted = needed(listing)
    monkeypatch.setattr(downloading, "CONNECTIONS", 1)

    def interrupt(done: int, total: int) -> None:
        if done == total - len(files[SHARDS[1]]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(listing, wanted, interrupt)
    assert cached_path(MODEL) is None
    assert missing_bytes(listing, wanted) == len(files[SHARDS[0]]) + len(files[SHARDS[1]])
    hub.requests.clear()

    fetch()

    assert sorted(hub.fetched()) == SHARDS
    assert list((snapshot_folder(MODEL, listing.commit).parents[1] / "blobs").glob("*.incomplete")) == []


def test_all_requests_name_the_commit_that_was_listed(hub: Hub, files: dict[str, bytes]) -> None:
    repository = hub.add("org/model", files)
    first = repository.main
    listing = look_up(MODEL)
    wanted = needed(listing)
    second = repository.commit(files | {"config.json": b'{"model_type": "another"}'})

    snapshot = download(listing, wanted, lambda done, total: None)

    assert snapshot.name == first
    assert (snapshot / "config.json").read_bytes() == files["config.json"]
    assert not any(second in path for _, path, _ in hub.requests)


@pytest.mark.parametrize("content", [b"{}", b"other bytes" * 20_000])
def test_a_file_that_is_not_what_was_listed_is_refused(
    hub: Hub, files: dict[str, bytes], content: bytes
) -> None:
    repository = hub.add("org/model", files)
    listing = look_up(MODEL)
    wanted = needed(listing)
    repository.lies[SHARDS[1]] = content

    with pytest.raises(
        LociError, match=rf"{SHARDS[1]} is not what 127.0.0.1:\d+ listed .* changed meanwhile"
    ):
        download(listing, wanted, lambda done, total: None)

    assert cached_path(MODEL) is None
    repository.lies.clear()
    assert (fetch() / SHARDS[1]).read_bytes() == files[SHARDS[1]]


def test_an_older_revision_stays_in_use_until_the_newer_is_whole(hub: Hub, files: dict[str, bytes]) -> None:
    repository = hub.add("org/model", files)
    old = fetch()
    repository.commit(files | {"tokenizer_config.json": b'{"x": 1}'})
    repository.lies["tokenizer_config.json"] = b"{}"
    listing = look_up(MODEL)
    wanted = {name: listing.files[name].nbytes for name in (*NEEDED, "tokenizer_config.json")}

    with pytest.raises(LociError):
        download(listing, wanted, lambda done, total: None)
    assert cached_path(MODEL) == old

    repository.lies.clear()
    hub.requests.clear()
    new = fetch()
    assert cached_path(MODEL) == new != old
    assert cached_path(HubModel("org/model", old.name)) == old
    assert [path.rpartition("/")[2] for method, path, span in hub.requests if method == "GET" and not span
            and "/resolve/" in path] == ["tokenizer_config.json"]  # fmt: skip


def test_other_revisions_are_kept_apart(hub: Hub, files: dict[str, bytes]) -> None:
    repository = hub.add("org/model", files)
    old = repository.main
    repository.commit(files | {"README.md": b"# new"})

    assert fetch(HubModel("org/model", old)).name == old
    assert cached_path(MODEL) is None
    with pytest.raises(ConfigError, match="org/model has no revision v9;"):
        look_up(HubModel("org/model", "v9"))


def test_gated_and_missing_models_are_one_line(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", files).gated = True
    for token in ("", "hf_x"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            ConfigError, match=r"^org/gated is gated: accept its terms at \S+/org/gated, then set"
        ):
            needed(look_up(HubModel("org/gated")))
    with pytest.raises(ConfigError, match=r"org/nothing: neither a directory here nor a model on 127.0.0.1"):
        look_up(HubModel("org/nothing"))


def test_a_hub_that_is_out_of_reach_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(
        LociError, match=r"^127.0.0.1:9 cannot be reached for org/model: .*; try again later$"
    ):
        look_up(MODEL)


def test_offline_nothing_is_asked(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(ConfigError, match=r"org/model is not \(or not whole\) in .*HF_HUB_OFFLINE forbids"):
        look_up(MODEL)
    assert hub.requests == []


def test_a_full_disk_is_said_before_anything_is_fetched(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", files)
    listing = look_up(MODEL)
    wanted = needed(listing)
    hub.requests.clear()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_001_000_000))

    with pytest.raises(BudgetError, match=r"org/model needs 0.00218 GB more in \S+, where 1 GB are free"):
        download(listing, wanted, lambda done, total: None)
    assert hub.requests == []
    check_room(listing, 1_000_000)
