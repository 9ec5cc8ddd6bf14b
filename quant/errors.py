"""The errors Loci raises on purpose. Each message says what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LociError(Exception):
    """Base of every error meant for users; the CLI prints it as one line."""


class FormatError(LociError):
    """Packed bytes, scales or shapes that the format does not allow."""


class ConfigError(LociError):
    """A model configuration or a setting that is missing, contradictory or not supported."""


class CheckpointError(LociError):
    """A checkpoint on disk that is incomplete, damaged or not what its config describes."""


class BudgetError(LociError):
    """Something that does not fit in its memory budget."""


class RequestError(LociError):
    """A request that cannot be served; `param` names the offending field, if any."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CapacityError(LociError):
    """The server cannot accept the request now; retrying later may work."""


class Findings:
    """Collects the errors of several checks, to be raised together."""

    def __init__(self) -> None:
        self._found: list[LociError] = []

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Collect a LociError raised in the block."""
        try:
            yield
        except LociError as error:
            self._found.append(error)

    def raise_any(self) -> None:
        """Raise the collected error, or a CheckpointError with all of them if there are several."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise CheckpointError("\n".join(map(str, self._found)))
