"""What the engine asks of a part of a model, wherever that is and whatever carries the calls."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.cluster.messages import Handed, OpenedCache, Restored, Work


class Pending(Protocol):
    """A call's result that may not be there yet."""


class Stage(Protocol):
    """A part of the model, wherever it is. Calls are made in order; results come when they are asked for.

    name  for messages
    """

    name: str

    def open(self, slots: int, capacity: int) -> OpenedCache:
        """See `Part.open`. Raises StageLostError where the part cannot be reached, as all calls do."""
        ...

    def session(self) -> str:
        """See `Part.session`."""
        ...

    def work(self, work: Work, received: Pending | None) -> Pending:
        """See `Part.work`; begins as soon as what it needs is there."""
        ...

    def fetch(self, pending: Pending) -> Handed:
        """What a call of `work` has made."""
        ...

    def restore(self, work: Work, slot: int, prompt: NDArray[np.int32], salt: str) -> Pending:
        """See `Part.restore`."""
        ...

    def fetch_restored(self, pending: Pending) -> Restored:
        """What a call of `restore` has found."""
        ...
