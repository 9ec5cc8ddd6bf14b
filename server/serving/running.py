"""Running answers by the ids that clients know, so that another connection can cancel them."""

from __future__ import annotations

from server.serving.generation import Generation
from server.serving.reply import Reply


class RunningAnswers:
    """Lives on the event loop. Only the key that asked for an answer finds it."""

    def __init__(self) -> None:
        self._by_id: dict[tuple[str | None, str], dict[Generation, Reply]] = {}

    def begin(self, owner: str | None, ids: tuple[str, ...], generation: Generation, reply: Reply) -> None:
        """`reply` is being generated for the key named `owner`, and is known by each of `ids`."""
        for each in ids:
            # Clients choose the ids of their requests, and may choose one twice.
            self._by_id.setdefault((owner, each), {})[generation] = reply

    def end(self, owner: str | None, ids: tuple[str, ...], generation: Generation) -> None:
        """It is no longer being generated."""
        for each in ids:
            found = self._by_id[owner, each]
            del found[generation]
            if not found:
                del self._by_id[owner, each]

    def cancel(self, owner: str | None, answer_id: str) -> list[Reply]:
        """Cancel the answer with that id: slots are freed within a step, clients are notified. Returns what
        was cancelled."""
        found = dict(self._by_id.get((owner, answer_id), {}))
        for generation in found:
            generation.cancel()
        return list(found.values())
