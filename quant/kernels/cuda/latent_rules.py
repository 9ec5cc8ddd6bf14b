"""How operations on parts of vectors become part of others: what is read and written stays where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Chains, Noted


def part(op: Noted, chains: Chains) -> Noted:
    """A part of a multiple."""
    whole = chains.written_by(op.ins["x"], "times")
    if whole is None:
        return op
    return replace(op, ins=op.ins | {"x": whole.ins["x"], "factor": whole.ins["number"]})


def of_part(op: Noted, chains: Chains) -> Noted:
    """An operation on a vector's part reads it where it is. Of one on heads, each head has a part."""
    before = chains.before(op.ins["x"], "part")
    if before is None or op.ins.get("at") is not None or before.ins["parts"] != op.ins["heads"]:
        return op
    chains.drop(before)
    x, parts = before.ins["x"], before.ins["parts"]
    at = before.ins["first"], x.width // parts, before.ins["cols"]
    return replace(op, ins=op.ins | {"x": x, "at": at, "factor": before.ins["factor"]})


def stored_join(op: Noted, chains: Chains) -> Noted:
    """Two vectors that are stored side by side, each by itself."""
    join = chains.before(op.ins["x"], "join")
    if join is None or join.ins["parts"] != 1 or not op.is_plain("weight", "bias", "turns", "limit"):
        return op
    both = [chains.before(join.ins[name], "latent") for name in ("x", "y")]
    if any(each is None or not each.is_plain("state") for each in both):
        return op
    first = 0
    stored: list[Noted] = []
    for each in both:
        assert each is not None
        where = {name: op.ins[name] for name in ("state", "stored", "ratio")} | {"column": first}
        stored.append(replace(each, ins=each.ins | where, outs={}, changes=op.changes))
        first += each.outs["out"].width
        chains.drop(each)
    chains.drop(join)
    chains.add(stored[0])
    return stored[1]


def joined(op: Noted, chains: Chains) -> Noted:
    """Of what is encoded, two vectors side by side, each written to its place."""
    join = chains.before(op.ins["x"], "join")
    if join is None:
        return op
    both = [chains.before(join.ins[name], "latent") for name in ("x", "y")]
    if any(each is None or not each.is_plain("state") for each in both):
        return op
    first, whole = 0, join.outs["out"]
    chains.drop(join)
    for each in both:
        assert each is not None
        to = first, whole.width // join.ins["parts"]
        first += each.outs["out"].width // join.ins["parts"]
        chains.drop(each)
        chains.add(replace(each, ins=each.ins | {"to": to}, outs={"out": whole}))
    return op


def joined_queries(op: Noted, chains: Chains) -> Noted:
    """Queries of heads' products and of turned parts of the same vectors, which are turned where they are
    read."""
    join = chains.before(op.ins["q"], "join")
    if join is None or op.ins.get("turns") is not None:
        return op
    made, turned = chains.before(join.ins["x"], "heads"), chains.before(join.ins["y"], "latent")
    if made is None or turned is None or not turned.is_plain("weight", "bias", "limit", "state"):
        return op
    if any(made.ins.get(name) != turned.ins.get(name) for name in ("x", "factor", "heads")):
        return op
    if turned.ins.get("at") is None or made.ins.get("at") is None:
        return op
    chains.drop(join, made, turned)
    queries = join.outs["out"]
    given = {"to": (0, queries.width // made.ins["heads"]), "beside": turned.ins["at"]}
    chains.add(replace(made, ins=made.ins | given, outs={"out": queries}))
    return replace(op, ins=op.ins | {"turns": turned.ins["turns"]})


def biased(op: Noted, chains: Chains) -> Noted:
    """A norm, and what is added to it."""
    norm = chains.before(op.ins["x"], "latent") or chains.before(op.ins["x"], "read")
    if norm is not None and norm.kind == "read":
        chains.drop(norm)
        return replace(
            norm,
            kind="latent",
            ins=norm.ins | {"bias": op.ins["rows"], "heads": 1, "stored": 0},
            outs=op.outs,
        )
    if norm is None or not norm.is_plain("bias", "turns", "state", "limit"):
        return op
    chains.drop(norm)
    return replace(norm, ins=norm.ins | {"bias": op.ins["rows"]}, outs=op.outs)


def apart(op: Noted) -> Iterator[Noted]:
    """What is left of parts and joins: columns that are moved."""
    if op.kind == "part":
        x, parts = op.ins["x"], op.ins["parts"]
        at = op.ins["first"], x.width // parts, op.ins["cols"]
        yield _moved(op, x, parts, at, (0, op.ins["cols"]), op.ins["factor"])
    elif op.kind == "join":
        parts, first, total = op.ins["parts"], 0, op.outs["out"].width
        for name in ("x", "y"):
            width = op.ins[name].width // parts
            yield _moved(op, op.ins[name], parts, (0, width, width), (first, total // parts), 1.0)
            first += width
    else:
        yield op


def _moved(op: Noted, x: Buffer, heads: int, at: Any, to: Any, factor: float) -> Noted:
    return replace(op, kind="move", ins={"x": x, "heads": heads, "at": at, "to": to, "factor": factor})
