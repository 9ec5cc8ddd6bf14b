"""How noted operations become fewer, larger ones.

An operation's neighbours in a chain are made part of it where nobody else reads what passes between them:
RMSNorm, rotation and the way into a sequence's state are one pass over a vector; queries are turned where
they are read; a gated pair is multiplied at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Chains, Noted
from quant.kernels.cuda.latent_rules import (
    apart,
    biased,
    joined,
    joined_queries,
    of_part,
    part,
    stored_join,
)
from quant.kernels.cuda.products import family_of
from quant.packed import PackedTensor

LONGEST = 4096  # of a vector that one program of a row task holds


def fused(noted: Sequence[Noted], kept: Sequence[Buffer]) -> list[Noted]:
    """The same computation in fewer operations; buffers that are `kept` are read from outside."""
    chains = Chains(noted, kept)
    for op in noted:
        chains.add(_RULES.get(op.kind, _alone)(op, chains))
    needed = _needed(list(_settled(op for op in chains.ops if op is not None)), kept)
    return [each for op in needed for each in apart(op)]


def _needed(ops: Sequence[Noted], kept: Sequence[Buffer]) -> list[Noted]:
    """Those that write what somebody reads, or do more than write buffers."""
    read = {id(buffer) for buffer in kept}
    needed: list[Noted] = []
    for op in reversed(ops):
        does_more = not op.outs or op.changes or op.words or op.kind == "hand_over"
        if does_more or any(id(out) in read for out in op.outs.values()):
            needed.append(op)
            read.update(id(buffer) for buffer in op.reads)
    return needed[::-1]


def _alone(op: Noted, chains: Chains) -> Noted:
    return op


def _read(op: Noted, chains: Chains) -> Noted:
    """A weighted sum of streams, then its norm."""
    before = chains.before(op.ins["x"], "read")
    if before is not None and before.ins["eps"] is None and op.is_plain("pre"):
        chains.drop(before)
        return replace(op, ins=op.ins | {"x": before.ins["x"], "pre": before.ins["pre"]})
    residual = chains.written(op.ins["x"], "residual")
    if residual is not None and residual.is_plain("weight") and _is_norm(op):
        given = {"weight": op.ins["weight"], "eps": op.ins["eps"]}
        outs = residual.outs | {"out": op.outs["out"]}
        chains.drop(residual)
        return replace(residual, ins=residual.ins | given, outs=outs)
    if chains.before(op.ins["x"], "part") is not None and _is_task(op):
        return of_part(replace(op, kind="latent", ins=op.ins | {"heads": 1, "stored": 0}), chains)
    before = chains.before(op.ins["x"], "pool")
    if before is not None and before.is_plain("weight") and op.is_plain("pre"):
        chains.drop(before)
        weight = {"weight": op.ins["weight"], "eps": op.ins["eps"]}
        return replace(before, ins=before.ins | weight, outs={"out": op.outs["out"]})
    return op


def _latent(op: Noted, chains: Chains) -> Noted:
    """A norm, then a limit, then a turn, then the way into a state."""
    op = stored_join(of_part(op, chains), chains)
    before = None if op.ins.get("at") is not None else chains.before(op.ins["x"], "latent")
    if before is not None and _follows(before, op):
        is_row = before.ins["heads"] == 1 and before.is_plain(
            "turns", "at", "bias"
        )  # what is done to a row as a whole
        if is_row or before.ins["heads"] == op.ins["heads"]:
            chains.drop(before)
            given = {name: value for name, value in op.ins.items() if value is not None and name != "x"}
            of_whole_rows = is_row and op.ins["heads"] > 1 and not before.is_plain("weight")
            return replace(op, ins=before.ins | given | ({"whole": True} if of_whole_rows else {}))
    norm = chains.before(op.ins["x"], "read")
    if norm is not None and op.is_plain("weight") and _is_norm(norm):
        if op.ins["heads"] > 1 or _is_task(norm):
            chains.drop(norm)
            given = {name: norm.ins[name] for name in ("x", "weight", "eps")}
            return replace(op, ins=op.ins | given | {"whole": op.ins["heads"] > 1})
    return op


def _follows(before: Noted, op: Noted) -> bool:
    """Whether all that is done by an operation comes after what the other does, in one pass over a vector."""
    stages = "weight", "bias", "limit", "turns", "state"
    done, to_do = ([at for at, name in enumerate(stages) if not each.is_plain(name)] for each in (before, op))
    return not done or not to_do or done[-1] < to_do[0]


def _pool(op: Noted, chains: Chains) -> Noted:
    """Projections to their rings, and the group that they complete."""
    rows, gates = (chains.last_ring_write(op.ins[name]) for name in ("state", "gate_state"))
    chains.drop(rows, gates)
    gate, by_position = gates.ins["x"], None
    biased = chains.before(gate, "bias")
    if biased is not None:
        chains.drop(biased)
        gate, by_position = biased.ins["x"], biased.ins["rows"]
    return replace(op, ins=op.ins | {"x": rows.ins["x"], "gate": gate, "by_position": by_position})


def _gated(op: Noted, chains: Chains) -> Noted:
    """Two matrices of one input."""
    gate, up = (chains.before(op.ins[name], "product") for name in ("x", "y"))
    if gate is None or up is None or gate.ins["x"] is not up.ins["x"]:
        return op
    first, second = gate.ins["weight"], up.ins["weight"]
    if not (_are_alike(first, second) and all(each.is_plain("column", "up", "bias") for each in (gate, up))):
        return op
    chains.drop(gate, up)
    return replace(
        gate, ins=gate.ins | {"up": second, "limit": op.ins["number"]}, outs={"out": op.outs["out"]}
    )


def _are_alike(first: Any, second: Any) -> bool:
    if family_of(first) != family_of(second) or first.shape != second.shape:
        return False
    if isinstance(first, PackedTensor):
        return first.format is second.format
    return bool(first.dtype == second.dtype)


def _turned_back(op: Noted, chains: Chains) -> Noted:
    """What attention has found, turned; or else a vector."""
    attend = chains.before(op.ins["x"], "attend")
    if attend is not None and attend.is_plain("back") and op.is_plain("weight", "state"):
        chains.drop(attend)
        return replace(attend, ins=attend.ins | {"back": op.ins["turns"]}, outs={"out": op.outs["out"]})
    return _latent(op, chains)


def _attend(op: Noted, chains: Chains) -> Noted:
    """Queries turned by those that read them."""
    op = joined_queries(op, chains)
    turn = chains.before(op.ins["q"], "latent")
    if turn is not None and turn.is_plain("weight", "state", "at", "limit", "bias"):
        chains.drop(turn)
        return replace(op, ins=op.ins | {"q": turn.ins["x"], "turns": turn.ins["turns"]})
    return op


def _select(op: Noted, chains: Chains) -> Noted:
    """The same, and a factor of the weights."""
    turn = chains.before(op.ins["queries"], "latent")
    if turn is not None and turn.is_plain("weight", "state", "at", "limit", "bias"):
        chains.drop(turn)
        op = replace(op, ins=op.ins | {"queries": turn.ins["x"], "turns": turn.ins["turns"]})
    scale = chains.before(op.ins["weights"], "times")
    if scale is None:
        return op
    chains.drop(scale)
    return replace(op, ins=op.ins | {"weights": scale.ins["x"], "factor": scale.ins["number"]})


def _write(op: Noted, chains: Chains) -> Noted:
    """Experts' outputs summed up where they are written to the streams."""
    total = chains.before(op.ins["y"], "add_up")
    if total is None:
        return op
    chains.drop(total)
    return replace(op, ins=op.ins | total.ins, sees=(*op.sees, *total.sees))


def _mail(op: Noted, chains: Chains) -> Noted:
    """What a mailbox is for, left by the router."""
    route = chains.writer(op.ins["places"])
    chains.drop(route)
    left = {name: value for name, value in op.ins.items() if name != "places"}
    return replace(route, ins=route.ins | left, changes=(*route.changes, *op.changes))


def _sum(op: Noted, chains: Chains) -> Noted:
    """Experts' outputs and the shared expert's; or else a residual and what a sublayer adds to it."""
    total = chains.before(op.ins["x"], "add_up")
    if total is not None and total.is_plain("y"):
        chains.drop(total)
        return replace(total, ins=total.ins | {"y": op.ins["y"]}, outs={"out": op.outs["out"]})
    ins = op.ins | {"factor": 1.0, "weight": None, "eps": None}
    residual = replace(op, kind="residual", ins=ins, outs={"sum": op.outs["out"]})
    scaled = chains.before(residual.ins["y"], "times")
    if scaled is not None:
        chains.drop(scaled)
        given = {"y": scaled.ins["x"], "factor": scaled.ins["number"]}
        residual = replace(residual, ins=residual.ins | given)
    total = chains.before(residual.ins["y"], "add_up")
    if total is not None:
        chains.drop(total)
        given = {name: value for name, value in total.ins.items() if name != "out"}
        residual = replace(residual, ins=residual.ins | given, sees=(*residual.sees, *total.sees))
    return residual


def _attend_kv(op: Noted, chains: Chains) -> Noted:
    """And a factor of the queries."""
    scaled = chains.before(op.ins["q"], "times")
    if scaled is None:
        return op
    chains.drop(scaled)
    scale = op.ins["scale"] * scaled.ins["number"]
    return replace(op, ins=op.ins | {"q": scaled.ins["x"], "scale": scale})


_RULES = {
    "part": part,
    "heads": of_part,
    "bias": biased,
    "encode": joined,
    "read": _read,
    "latent": _turned_back,
    "pool": _pool,
    "gated": _gated,
    "attend": _attend,
    "select": _select,
    "write": _write,
    "mail": _mail,
    "sum": _sum,
    "attend_kv": _attend_kv,
}


def _is_norm(op: Noted) -> bool:
    """Whether what is read is a vector's norm, times a weight."""
    return bool(op.is_plain("pre") and op.ins["weight"] is not None)


def _is_task(op: Noted) -> bool:
    """Whether a norm is of what one program of a row task holds."""
    return _is_norm(op) and op.outs["out"].width <= LONGEST


def _settled(ops: Iterator[Noted]) -> Iterator[Noted]:
    """Norms of short vectors are row tasks like others."""
    for op in ops:
        if op.kind == "read" and _is_task(op):
            yield replace(op, kind="latent", ins=op.ins | {"heads": 1, "stored": 0})
        else:
            yield op
