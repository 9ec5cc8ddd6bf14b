"""llama.cpp's own server in a process of its own, from the package xllamacpp, which brings it compiled.

The process runs this module: `python -m server.cli.bench.llama_cpp MODEL THREADS STREAMS CONTEXT`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from engine.distribution import version_of
from quant.errors import ConfigError

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"  # the last number is llama.cpp's build
ERRORS_ONLY = 1
# What Loci asks of the libraries in its own process, and hands on to children.
LOCI_VARIABLES = (
    "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "CUDA_DEVICE_MAX_CONNECTIONS",
)  # fmt: skip


def check_installed() -> None:
    """Raises ConfigError where the package is missing."""
    if find_spec(PACKAGE) is None:
        raise ConfigError(
            f"llama.cpp is not installed; run `{sys.executable} -m pip install {PACKAGE}=={VERSION}` "
            "(34 MB), or install Loci with the extra `bench`"
        )


def describe() -> str:
    """Versions of the package and of llama.cpp, and the instruction sets it was compiled for."""
    from xllamacpp import get_system_info

    version = version_of(PACKAGE) or ""
    parts = (part.partition("=") for part in get_system_info().partition(":")[2].split("|"))
    compiled_for = " ".join(name.strip() for name, _, value in parts if value.strip() == "1")
    return f"llama.cpp b{version.rpartition('.')[2]} ({PACKAGE} {version}): {compiled_for}"


@contextmanager
def serving_llama_cpp(model: Path, threads: int, streams: int, context: int) -> Iterator[str]:
    """The URL of a new llama.cpp server with `streams` slots of `context` tokens, once it is ready.

    Raises LociError where it fails.
    """
    from server.cli.child import child_server

    environment = {name: value for name, value in os.environ.items() if name not in LOCI_VARIABLES}
    arguments = map(str, (model, threads, streams, context))
    with child_server(__name__, *arguments, ready="/health", environment=environment) as url:
        yield url


def main(model: str, threads: int, streams: int, context: int) -> None:
    """Serve until a signal ends this process. Everything that is not named here is llama.cpp's default."""
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path = model
    params.port = 0
    params.n_parallel = streams
    params.n_ctx = streams * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 0  # else it would keep states that no later prompt asks for
    params.verbosity = ERRORS_ONLY
    try:
        server = Server(params)
    except RuntimeError as error:
        sys.exit(f"llama.cpp does not start: {error}")
    print(f"llama.cpp listens on {server.listening_address} ", flush=True)
    signal.pause()


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    main(path, *map(int, numbers))
