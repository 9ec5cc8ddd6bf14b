"""Parts of a model as Ray actors, one on each machine."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from engine.cluster.messages import Handed, OpenedCache, PartInfo, Restored, StageLostError, Work
from engine.cluster.part import Part
from engine.cluster.stage import Pending
from memory.checkpoint.part import Span
from quant.errors import ConfigError, LociError
from server.cluster.on_machine import Look, OnMachine, Wish, look

log = logging.getLogger("loci")

LOCAL = "local"
# What a Ray that is started here may hold of values on their way between stages.
OBJECT_STORE_BYTES = 256_000_000
RESTARTS = -1  # as often as it takes


class Ray(Protocol):
    """The module, as far as it is used here; it has no types of its own for all of it."""

    util: Any
    exceptions: Any

    def is_initialized(self) -> bool: ...
    def init(self, **how: Any) -> Any: ...
    def shutdown(self) -> None: ...
    def nodes(self) -> list[dict[str, Any]]: ...
    def remote(self, *args: Any, **how: Any) -> Any: ...
    def get(self, refs: Any) -> Any: ...
    def get_runtime_context(self) -> Any: ...


def check_installed() -> None:
    """Raises ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--cluster needs Ray, which Loci's extra `cluster` has: pip install -e '.[cluster]' in its folder"
        )


def ray_module() -> Ray:
    """Ray, which reports nothing to its makers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call while this process ends would start another Ray
    import ray

    module: Ray = ray
    return module


@dataclass(frozen=True)
class Connected:
    """A Ray: its machines, this one first, and whether it is this process's own and ends with it."""

    nodes: list[str]
    is_own: bool


def connect(address: str) -> Connected:
    """Connect to the Ray at `address`.

    `local` starts one for as long as this process lives, which listens on this machine alone and knows its
    own by a token; `auto` means the one that runs on this machine already, and where none does, `local`.
    Raises ConfigError.
    """
    if address == "auto" and not _runs_here():
        address = LOCAL
    if address == LOCAL:
        # Read when Ray is imported, here and in what it starts; else it looks for the network.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray would end processes where memory is nearly full, which a plan may have made it.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = ray_module()
    if not ray.is_initialized():
        own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            _in_lasting_thread(
                lambda: ray.init(address=address, **quiet, **(own if address == LOCAL else {}))
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(f"--cluster {address}: no Ray answers there ({_line(error)})") from None
    if os.environ.get("RAY_AUTH_MODE") != "token":
        log.warning("this Ray asks for no token: who can reach it can run programs on it (docs/cluster.md)")
    here = ray.get_runtime_context().get_node_id()
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return Connected(sorted(alive, key=lambda node: (node != here, node)), is_own=address == LOCAL)


def _in_lasting_thread(work: Callable[[], object]) -> None:
    """Do `work` in a thread that never ends: with the thread that started them, Linux ends children that are
    to end with their parent. Raises what it raises."""
    done, raised = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
            return
        finally:
            done.set()
        threading.Event().wait()

    threading.Thread(target=run, name="loci-ray", daemon=True).start()
    done.wait()
    if raised:
        raise raised[0]


def _runs_here() -> bool:
    """Whether a Ray runs on this machine."""
    return any(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"]))


class _Actor:
    """What Ray runs on a machine. A failed load does not end the process: it is told to who asks."""

    def __init__(self, settings: dict[str, Any], span: Span, threads: int) -> None:
        torch.set_num_threads(threads)
        self._machine = OnMachine(settings, span)
        self._part: Part | None = None

    def wish(self) -> Wish:
        return self._machine.wish()

    def load(self, agreed: dict[str, Any], slots: int) -> PartInfo:
        self._part = self._machine.load(agreed)
        return self._part.describe(slots)

    def open(self, slots: int, capacity: int) -> OpenedCache:
        return self._loaded.open(slots, capacity)

    def session(self) -> str:
        return "" if self._part is None else self._part.session()

    def work(self, work: Work, received: Handed | None) -> Handed:
        return self._loaded.work(work, received)

    def restore(self, work: Work, slot: int, prompt: NDArray[np.int32], salt: str) -> Restored:
        return self._loaded.restore(work, slot, prompt, salt)

    def process(self) -> int:
        return os.getpid()

    @property
    def _loaded(self) -> Part:
        if self._part is None:
            raise StageLostError(
                "a part of the model was started again and is not loaded yet; try again soon"
            )
        return self._part


class RayStage:
    """A part on another machine, or in another process of this one."""

    def __init__(self, settings: dict[str, Any], span: Span, node: str, threads: int) -> None:
        ray = ray_module()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.name = str(span)
        self._agreed: tuple[dict[str, Any], int] | None = None
        remote = ray.remote(_Actor).options(
            num_cpus=0,
            max_restarts=RESTARTS,
            max_task_retries=0,  # work that was lost is another sequence's by now
            # Where the machine itself is gone, another one may have room for its layers.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        )
        self._actor = remote.remote(settings, span, threads)

    def ask_wish(self) -> Any:
        """A call whose result `get` returns: what the machine's plan would serve."""
        return self._actor.wish.remote()

    def ask_load(self, agreed: dict[str, Any], slots: int) -> Any:
        """A call that loads the part, and again whenever it was lost."""
        self._agreed = agreed, slots
        return self._actor.load.remote(agreed, slots)

    def process(self) -> int:
        """The number of its process."""
        return int(get(self._actor.process.remote()))

    def open(self, slots: int, capacity: int) -> OpenedCache:
        if self._agreed is not None:
            get(self._actor.load.remote(*self._agreed))
        opened: OpenedCache = get(self._actor.open.remote(slots, capacity))
        return opened

    def session(self) -> str:
        return str(get(self._actor.session.remote()))

    def work(self, work: Work, received: Pending | None) -> Pending:
        pending: Pending = self._actor.work.remote(work, received)
        return pending

    def fetch(self, pending: Pending) -> Handed:
        handed: Handed = get(pending)
        return handed

    def restore(self, work: Work, slot: int, prompt: NDArray[np.int32], salt: str) -> Pending:
        pending: Pending = self._actor.restore.remote(work, slot, prompt, salt)
        return pending

    def fetch_restored(self, pending: Pending) -> Restored:
        restored: Restored = get(pending)
        return restored

    def stop(self) -> None:
        """End its process."""
        ray: Any = ray_module()
        ray.kill(self._actor)


def get(pending: Any) -> Any:
    """The result of a call. Raises what it raised, if that is a LociError, and StageLostError where the
    process or its machine is gone."""
    ray = ray_module()
    try:
        return ray.get(pending)
    except ray.exceptions.RayError as error:
        found: BaseException = error
        while isinstance(found, ray.exceptions.RayTaskError) and isinstance(found.cause, BaseException):
            found = found.cause
        if isinstance(found, LociError):
            raise found from None
        if isinstance(found, ray.exceptions.RayTaskError) or not isinstance(found, ray.exceptions.RayError):
            raise
        raise StageLostError(
            f"a part of the model is gone ({type(found).__name__}); try again soon"
        ) from None


def looks(settings: dict[str, Any], nodes: Sequence[str]) -> list[Look]:
    """What each machine has. Raises ConfigError where one cannot use its copy of the model."""
    ray = ray_module()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pending = [
        ray.remote(look)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(settings)
        for node in nodes
    ]
    return [get(each) for each in pending]


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
