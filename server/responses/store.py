"""Answers of /v1/responses that clients may come back to: a bounded number of bytes, in memory only."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from server.openai.messages import Message


@dataclass(frozen=True)
class StoredResponse:
    """An answer as it was sent, and the conversation up to it, without instructions.

    owner        name of the API key that it belongs to; nobody else finds it
    input_items  what the client had sent, as it may read it back
    """

    owner: str | None
    response: dict[str, Any]
    conversation: tuple[Message, ...]
    input_items: tuple[dict[str, Any], ...] = ()

    @property
    def size_bytes(self) -> int:
        """About what it takes, told by its JSON."""
        messages = sum(len(message.model_dump_json()) for message in self.conversation)
        return len(json.dumps([self.response, self.input_items])) + messages


class ResponseStore:
    """Keeps what was used last within `capacity_bytes`; 0 keeps nothing."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()

    def put(self, stored: StoredResponse) -> None:
        """Keep `stored`, in place of those not used for longest."""
        size = stored.size_bytes
        if size > self._capacity_bytes:
            return
        self._stored[stored.response["id"]] = stored, size
        self._used_bytes += size
        while self._used_bytes > self._capacity_bytes:
            _, (_, size) = self._stored.popitem(last=False)
            self._used_bytes -= size

    def get(self, response_id: str, owner: str | None) -> StoredResponse | None:
        """The answer of that id, if it is kept and belongs to `owner`."""
        stored, _ = self._stored.get(response_id, (None, 0))
        if stored is None or stored.owner != owner:
            return None
        self._stored.move_to_end(response_id)
        return stored

    def item(self, item_id: str, owner: str | None) -> dict[str, Any] | None:
        """The item of that id of an answer or of what it answers, if it is kept and belongs to `owner`."""
        for response_id, (stored, _) in reversed(self._stored.items()):
            items = (*stored.response["output"], *stored.input_items)
            found = next((item for item in items if item["id"] == item_id), None)
            if stored.owner == owner and found is not None:
                self._stored.move_to_end(response_id)
                return dict(found)
        return None

    def remove(self, response_id: str, owner: str | None) -> bool:
        """Forget the answer of that id; False where `owner` has none."""
        if self.get(response_id, owner) is None:
            return False
        _, size = self._stored.pop(response_id)
        self._used_bytes -= size
        return True
