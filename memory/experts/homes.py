"""Which GPU each expert of a layer belongs to: in proportion to the room that they have."""

from __future__ import annotations

from collections.abc import Sequence


def homes_of(room: Sequence[int], ranking: Sequence[int], first: int = 0) -> list[int]:
    """The GPU of each expert, by number.

    room     slots of the layer on each GPU
    ranking  the layer's experts, hottest first: as many as there is room for are divided exactly so, the
             others, which may take their slots, in the same proportion
    first    which GPU begins where all are alike: another one in each layer

    Hot experts are spread over all GPUs alike, so that none has more to compute than its share of room.
    """
    homes = [0] * len(ranking)
    total = sum(room)
    if not total:
        return homes
    order = [(first + number) % len(room) for number in range(len(room))]
    given = [0] * len(room)
    for place, expert in enumerate(ranking):
        at = place % total
        if at == 0:
            given = [0] * len(room)
        behind = {gpu: room[gpu] * (at + 1) - given[gpu] * total for gpu in order if given[gpu] < room[gpu]}
        chosen = max(behind, key=lambda gpu: behind[gpu])
        given[chosen] += 1
        homes[expert] = chosen
    return homes


def shares_of(slots: int, layers: int) -> list[int]:
    """Slots of each layer, where they are divided evenly."""
    return [slots // layers + (layer < slots % layers) for layer in range(layers)]
