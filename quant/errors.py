"""The errors Loci raises on purpose. Each message says what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LociError(Exception):
    """Base of every error that is meant for a person; the CLI prints it as one line."""


class FormatError(LociError):
    """Packed bytes, scales or shapes that the format does not allow."""


class ConfigError(LociError):
    """A model configuration or a setting that is missing, contradictory or not supported."""


class CheckpointError(LociError):
    """A checkpoint on disk that is incomplete, damaged or not what its config describes."""


class BudgetError(LociError):
    """Something that does not fit into the memory it was given."""


class RequestError(LociError):
    """A request that cannot be served as asked; `param` names the offending field where there is one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CapacityError(LociError):
    """The server cannot take the request now; trying again later may work."""


class Findings:
    """What several checks of one thing find wrong, to be raised together once all were made."""

    def __init__(self) -> None:
        self._found: list[LociError] = []

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Keep the LociError that is raised inside for later."""
        try:
            yield
        except LociError as error:
            self._found.append(error)

    def raise_any(self) -> None:
        """Raise what was found: the error itself where it is one, else a CheckpointError with them all."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise CheckpointError("\n".join(map(str, self._found)))
