"""The order in which a recorded step's operations are launched: what is ready at the same time goes together.

Operations are ordered by what they read and write, not by when they were noted. Of those that are ready, the
one with the longest way to the step's end goes next, and takes along whatever its kernel can do beside it.
But products that can wait do not delay those that a mailbox waits for: whoever answers works at the same
time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Noted
from quant.kernels.cuda.products import go_together

TASKS = ("latent", "pool", "mix", "route", "weigh", "turns")
STREAMS = ("mixed", "read")
LAUNCHES = {"attend": 2, "attend_kv": 2, "experts": 2, "hand_over": 0, "await": 0, "called": 0, "reply": 0}
MAIL = 8  # more than there are: the sooner it is sent, the sooner there is an answer
MOST_TASKS = 64


def scheduled(noted: Sequence[Noted]) -> list[list[Noted]]:
    """Groups of operations; each group is launched together, and needs only what earlier ones have done."""
    needs = _needs(noted)
    heights = _heights(noted, needs)
    mails = _mails(noted, needs)
    followers: dict[int, list[int]] = defaultdict(list)
    missing = [len(of) for of in needs]
    for at, of in enumerate(needs):
        for other in of:
            followers[other].append(at)
    ready = [at for at, count in enumerate(missing) if count == 0]
    # What only brings something is not put off: its reader may still go together with others.
    brings = [op.kind == "hand_over" and not op.reads for op in noted]
    groups: list[list[Noted]] = []
    while ready:
        ready.sort(key=lambda at: (not brings[at], -heights[at], at))
        chosen: list[int] = []
        for at in ready:
            can_wait = noted[at].kind == "product" and chosen != [] and mails[at] > mails[chosen[0]]
            if not chosen or (not can_wait and fit([noted[other] for other in chosen], noted[at])):
                chosen.append(at)
        groups.append([noted[at] for at in chosen])
        ready = [at for at in ready if at not in set(chosen)]
        for at in chosen:
            for follower in followers[at]:
                missing[follower] -= 1
                if missing[follower] == 0:
                    ready.append(follower)
    assert sum(map(len, groups)) == len(noted)
    return groups


def fit(group: Sequence[Noted], op: Noted) -> bool:
    """Whether an operation can be launched together with these."""
    kind = group[0].kind
    if kind == op.kind == "product":
        limits = {other.ins["limit"] for other in (*group, op) if other.ins["up"] is not None}
        weights = [other.ins[name] for other in (*group, op) for name in ("weight", "up")]
        count = len(group) + 1
        return len(limits) < 2 and go_together([w for w in weights if w is not None], count)
    if kind in TASKS and op.kind in TASKS:
        shapes = {
            ("mix", other.ins["shape"]) if other.kind == "mix" else ("route", other.ins["rule"])
            for other in (*group, op)
            if other.kind in ("route", "weigh", "mix")
        }
        return len({of for of, _ in shapes}) == len(shapes) and len(group) < MOST_TASKS
    if kind in STREAMS and op.kind in STREAMS:
        return len(group) == 1 and kind != op.kind
    return False


def _needs(noted: Sequence[Noted]) -> list[set[int]]:
    """For each operation, those that must be done before it."""
    writers: dict[int, list[int]] = defaultdict(list)  # by buffer
    changed: dict[int, list[int]] = defaultdict(list)  # by state
    seen: dict[int, list[int]] = defaultdict(list)
    needs: list[set[int]] = []
    for at, op in enumerate(noted):
        of = {other for buffer in op.reads for other in writers[id(buffer)]}
        of |= {other for state in (*op.sees, *op.changes) for other in changed[state.data_ptr()]}
        of |= {other for state in op.changes for other in seen[state.data_ptr()]}
        if op.kind == "hand_over" and at > 0:  # not before what the caller has noted before
            of.add(at - 1)
        needs.append(of)
        for buffer in op.outs.values():
            writers[id(buffer)].append(at)
        for state in op.sees:
            seen[state.data_ptr()].append(at)
        for state in op.changes:
            changed[state.data_ptr()].append(at)
    last = None
    for at, op in enumerate(noted):  # a caller's work is done in the order in which it was noted
        if op.kind == "hand_over":
            if last is not None:
                needs[at].add(last)
            last = at
    return needs


def _heights(noted: Sequence[Noted], needs: Sequence[set[int]]) -> list[int]:
    """Launches from each operation to the step's end, itself included."""
    heights = [0] * len(noted)
    for at in reversed(range(len(noted))):
        heights[at] += MAIL if noted[at].is_mailed else LAUNCHES.get(noted[at].kind, 1)
        for other in needs[at]:
            heights[other] = max(heights[other], heights[at])
    return heights


def _mails(noted: Sequence[Noted], needs: Sequence[set[int]]) -> list[int]:
    """The first operation that leaves mail and needs each; as many as there are operations, for none."""
    first = [len(noted)] * len(noted)
    for at in reversed(range(len(noted))):
        if noted[at].is_mailed:
            first[at] = at
        for other in needs[at]:
            first[other] = min(first[other], first[at])
    return first


def give_lives(groups: Sequence[Sequence[Noted]], kept: Sequence[Buffer]) -> list[Buffer]:
    """All buffers, each alive from the group that writes it to the last that reads it; those kept,
    throughout."""
    found: dict[int, Buffer] = {}
    for at, group in enumerate(groups):
        for op in group:
            for buffer in (*op.reads, *op.outs.values()):
                if id(buffer) not in found:
                    found[id(buffer)] = buffer
                    buffer.first = at
                buffer.last = at
    for buffer in kept:
        found[id(buffer)] = buffer
        buffer.first, buffer.last = -1, len(groups)
    return list(found.values())
