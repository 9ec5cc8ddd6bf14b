"""Answers under way, by the ids that their clients know, so that another connection can end them."""

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
        """It is not generated any more."""
        for each in ids:
            found = self._by_id[owner, each]
            del found[generation]
            if not found:
                del self._by_id[owner, each]

    def cancel(self, owner: str | None, answer_id: str) -> list[Reply]:
        """End what is known by that id: slots are free within a step, clients are told. What was ended."""
        found = dict(self._by_id.get((owner, answer_id), {}))
        for generation in found:
            generation.cancel()
        return list(found.values())
