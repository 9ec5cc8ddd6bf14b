"""Asking the Hub: what a repository holds at one commit, and the beginnings of its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from memory.hub.cache import cache_folder
from memory.hub.names import HubModel
from quant.errors import ConfigError, LociError


@dataclass(frozen=True)
class Listed:
    """A file as the Hub lists it: its bytes, and the hash of its content, by which the cache names it."""

    nbytes: int
    etag: str


@dataclass(frozen=True)
class Listing:
    """A repository at one commit, which all further requests name: nothing changes in between."""

    model: HubModel
    commit: str
    files: Mapping[str, Listed]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: file.nbytes for name, file in self.files.items()}


def hub_host() -> str:
    """The name of the Hub that is asked: huggingface.co, or what HF_ENDPOINT names."""
    return urlsplit(constants.ENDPOINT).netloc


def look_up(model: HubModel) -> Listing:
    """What the model's repository holds now. Raises LociError where the Hub does not say."""
    api = HfApi(endpoint=constants.ENDPOINT)
    with hub_errors(model):
        commit = api.model_info(model.repo, revision=model.revision).sha
        if commit is None:
            raise LociError(f"{hub_host()} does not say which commit {model} is; it is no Hub of models")
        tree = api.list_repo_tree(model.repo, recursive=True, revision=commit)
        files = {
            item.path: Listed(item.size, item.lfs.sha256 if item.lfs else item.blob_id)
            for item in tree
            if isinstance(item, RepoFile)
        }
    return Listing(model, commit, files)


def read_range(listing: Listing, name: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file. Raises LociError where they do not come."""
    stop = min(stop, listing.files[name].nbytes)
    if start >= stop:
        return b""
    url = hf_hub_url(listing.model.repo, name, revision=listing.commit, endpoint=constants.ENDPOINT)
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    with (
        hub_errors(listing.model),
        get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response,
    ):
        hf_raise_for_status(response)
        if response.status_code != httpx2.codes.PARTIAL_CONTENT and start > 0:
            raise LociError(f"{hub_host()} does not answer requests for parts of files")
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= stop - start:
                break
    if len(content) < stop - start:
        raise LociError(f"{hub_host()} sent {len(content)} of {stop - start} bytes of {name}; try again")
    return bytes(content[: stop - start])


@contextmanager
def hub_errors(model: HubModel) -> Iterator[None]:
    """Turns what goes wrong with the Hub in the block into one line that says what to do."""
    try:
        yield
    except LocalEntryNotFoundError as error:  # what huggingface_hub raises over the cause
        raise _explained(model, error.__cause__ or error) from None
    except (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, httpx2.HTTPError) as error:
        raise _explained(model, error) from None


def offline(model: HubModel) -> ConfigError:
    """The error for a model that would have to be downloaded where HF_HUB_OFFLINE forbids it."""
    return ConfigError(
        f"{model} is not (or not whole) in {cache_folder()}, and HF_HUB_OFFLINE forbids downloading it; "
        "unset HF_HUB_OFFLINE, or copy the model there"
    )


def _explained(model: HubModel, error: BaseException) -> LociError:
    host, page = hub_host(), f"{constants.ENDPOINT}/{model.repo}"
    if isinstance(error, OfflineModeIsEnabled):
        return offline(model)
    if isinstance(error, GatedRepoError):
        return ConfigError(
            f"{model} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account, or "
            "store one with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{model.repo} has no revision {model.revision}; {page} shows which it has")
    if isinstance(error, RepositoryNotFoundError):
        return ConfigError(
            f"{model}: neither a directory here nor a model on {host} that you may read; check the spelling, "
            "or set HF_TOKEN if it is private"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        advice = {
            401: "the token in HF_TOKEN, or stored by `hf auth login`, is not valid",
            403: "the token may not read it",
            429: "too many requests; try again later",
        }.get(status, "try again later")
        return LociError(f"{host} answered {status} for {model}: {advice}")
    if isinstance(error, HFValidationError):
        return ConfigError(f"{model}: not the name of a model on {host} ({error})")
    return LociError(f"{host} cannot be reached for {model}: {_first_line(error)}; try again later")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
