"""Noted operations as launches with fixed arguments, for a number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda import row_tasks as task
from quant.kernels.cuda.attention import SparseAttention
from quant.kernels.cuda.chains import Fixed, Noted
from quant.kernels.cuda.heads import Columns, head_products_launch, move_launch
from quant.kernels.cuda.kv_attention import KvAttention
from quant.kernels.cuda.latent_attention import LatentAttention
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.mailbox import Mail
from quant.kernels.cuda.products import Product, products_launch
from quant.kernels.cuda.residual import Residual
from quant.kernels.cuda.routing import routing_constants
from quant.kernels.cuda.row_codes import encode_launch, round_launch
from quant.kernels.cuda.row_tasks import RowTask, row_tasks_launch
from quant.kernels.cuda.schedule import STREAMS, TASKS
from quant.kernels.cuda.selection import Choice
from quant.kernels.cuda.step_experts import fetch_launch
from quant.kernels.cuda.streams import (
    GATED,
    SUM,
    TIMES,
    Choices,
    Mixed,
    MixShape,
    Read,
    add_up_launch,
    elements_launch,
    engram_launch,
    read_launch,
    repeat_launch,
    write_launch,
)


@dataclass(frozen=True)
class Places:
    """Where operations find what they read and write.

    arena     bytes of one device, in which buffers have offsets
    step      `[1 + 2 * max_rows]` int64: how many rows are alive, the slot of each, the position of each
    """

    arena: torch.Tensor
    step: torch.Tensor
    max_rows: int

    def rows(self, buffer: Buffer) -> torch.Tensor:
        """A buffer's rows, `[rows, width]`: valid while it lives."""
        if isinstance(buffer, Fixed):
            assert buffer.held is not None
            return buffer.held
        rows = self.max_rows if buffer.rows is None else buffer.rows
        nbytes = buffer.dtype.itemsize * rows * buffer.width
        part = self.arena[buffer.offset : buffer.offset + nbytes]
        return part.view(buffer.dtype).view(rows, buffer.width)

    def of(self, values: dict[str, Any]) -> dict[str, Any]:
        """The same with buffers' rows instead of buffers."""
        return {
            name: self.rows(value) if isinstance(value, Buffer) else value for name, value in values.items()
        }

    def launches(self, group: Sequence[Noted], rows: int) -> list[Launch]:
        """The launches of operations that go together, for the first `rows` rows."""
        kind = group[0].kind
        if kind == "product":
            limit = max((op.ins["limit"] for op in group if op.ins["up"] is not None), default=0.0)
            return [products_launch([self._product(op) for op in group], rows, limit)]
        if kind in TASKS:
            return [row_tasks_launch([self._task(op) for op in group], self.step, rows, self.max_rows)]
        if kind in STREAMS:
            mixed = next((self._mixed(op) for op in group if op.kind == "mixed"), None)
            read = next((self._read(op) for op in group if op.kind == "read"), None)
            return [read_launch(mixed, read, rows)]
        (op,) = group
        return _ALONE[kind](self, self.of(op.ins | op.outs), rows)

    def _product(self, op: Noted) -> Product:
        found = self.of(op.ins | op.outs)
        x, out = found["x"], found["out"]
        if found["column"] is not None:
            n, cols = found["weight"].shape
            x, out = x[:, found["column"] * cols :], out[:, found["column"] * n :]
        return Product(found["weight"], x, out, found["up"], found.get("bias"))

    def _mixed(self, op: Noted) -> Mixed:
        found = self.of(op.ins | op.outs)
        return Mixed(found["x"], found["fn"], found["parts"], found["shape"])

    def _read(self, op: Noted) -> Read:
        found = self.of(op.ins | op.outs)
        return Read(found["x"], found["pre"], found["weight"], found["eps"], found["out"])

    def _task(self, op: Noted) -> RowTask:
        return _TASKS[op.kind](self.of(op.ins | op.outs))


def _latent(of: dict[str, Any]) -> RowTask:
    heads, x = of["heads"], of["x"]
    first, step, width = of.get("at") or (0, x.shape[1] // heads, x.shape[1] // heads)
    fields: dict[int, Any] = {
        task.X.value: x[:, first:], task.X_ROW.value: x.shape[1], task.X_HEAD.value: step,
        task.WIDTH.value: width, task.HEADS.value: heads, task.STORED.value: of["stored"],
        task.FACTOR.value: float(of.get("factor") or 1.0),
    }  # fmt: skip
    if of.get("bias") is not None:
        fields[task.BIAS.value] = of["bias"]
    if of.get("weight") is not None:
        fields |= {task.WEIGHT.value: of["weight"], task.EPS.value: float(of["eps"])}
        fields[task.WHOLE.value] = int(of.get("whole") or 0)
    if of.get("limit") is not None:
        fields[task.LIMIT.value] = float(of["limit"])
    if of.get("turns") is not None:
        fields |= {task.TURNS.value: of["turns"], task.PAIRS.value: of["turns"].shape[1] // 2}
    if of.get("out") is not None:
        out = of["out"]
        to, out_step = of.get("to") or (0, width)
        fields |= {
            task.OUT.value: out[:, to:], task.OUT_ROW.value: out.shape[1], task.OUT_HEAD.value: out_step
        }  # fmt: skip
    if of.get("state") is not None:
        state, column = of["state"], of.get("column") or 0
        fields |= {
            task.STATE.value: state[..., column:], task.STATE_ROW.value: state.shape[-1],
            task.PLACES.value: state.shape[-2], task.STRIDE.value: state.stride(0),
            task.RATIO.value: of.get("ratio") or 1,
            task.HEAD_STRIDE.value: state.stride(1) if state.dim() == 4 else 0,
        }  # fmt: skip
    return RowTask(task.LATENT.value, fields, width, heads=heads)


def _pool(of: dict[str, Any]) -> RowTask:
    state, dim = of["state"], of["out"].shape[1]
    fields: dict[int, Any] = {
        task.X.value: of["x"], task.GATE.value: of["gate"], task.WEIGHT.value: of["weight"],
        task.EPS.value: float(of["eps"]), task.OUT.value: of["out"], task.STATE.value: state,
        task.GATE_STATE.value: of["gate_state"], task.WIDTH.value: dim,
        task.PLACES.value: state.shape[1], task.STRIDE.value: state.stride(0), task.RATIO.value: of["ratio"],
        task.SPLITS.value: int(of["overlaps"]),
    }  # fmt: skip
    if of.get("by_position") is not None:
        fields[task.SCALE.value] = of["by_position"]
    return RowTask(task.POOL.value, fields, dim)


def _mix(of: dict[str, Any]) -> RowTask:
    shape: MixShape = of["shape"]
    if shape.is_reading:
        return _reading(of, shape)
    fields = {
        task.X.value: of["parts"], task.SCALE.value: of["scale"], task.BASE.value: of["base"],
        task.OUT.value: of["pre"], task.POST.value: of["post"], task.COMBINE.value: of["combine"],
        task.SPLITS.value: shape.splits, task.WIDTH.value: shape.cols,
        task.ITERATIONS.value: of["iterations"], task.EPS.value: float(of["eps"]),
        task.NORM_EPS.value: float(of["norm_eps"]),
    }  # fmt: skip
    return RowTask(task.MIX.value, fields, 2, _of_mixes(shape))


def _reading(of: dict[str, Any], shape: MixShape) -> RowTask:
    fields = {
        task.X.value: of["parts"], task.SCALE.value: of["scale"], task.BASE.value: of["base"],
        task.OUT.value: of["pre"], task.SPLITS.value: shape.splits, task.WIDTH.value: shape.cols,
        task.EPS.value: float(of["eps"]), task.NORM_EPS.value: float(of["norm_eps"]),
    }  # fmt: skip
    return RowTask(task.READING.value, fields, 2, _of_mixes(shape))


def _of_mixes(shape: MixShape) -> dict[str, int | bool]:
    """Constants of tasks that make mixes."""
    splits = int(triton.next_power_of_2(shape.splits))
    return {"N": shape.n, "COUNT": shape.padded, "SPLITS_N": splits}


def _weigh(of: dict[str, Any]) -> RowTask:
    fields = {
        task.X.value: of["x"], task.WIDTH.value: of["x"].shape[1], task.GATE.value: of["ids"],
        task.POST.value: of["weights"], task.EPS.value: float(of["rule"].factor),
        task.NORM_EPS.value: float(of["rule"].epsilon),
    }  # fmt: skip
    rule = of["rule"]
    fields |= _of_places(of)
    return RowTask(task.WEIGH.value, fields, rule.top_k, routing_constants(rule), mail=_mail(of))


def _of_places(of: dict[str, Any]) -> dict[int, Any]:
    """Fields of the table of places, and of chosen experts' ones."""
    if of.get("table") is None:
        return {}
    return {task.STATE.value: of["table"], task.COMBINE.value: of["places"]}


def _mail(of: dict[str, Any]) -> Mail | None:
    if of.get("box") is None:
        return None
    return Mail(of["box"], of["number"], of["left"], of["guesses"])


def _route(of: dict[str, Any]) -> RowTask:
    fields = {
        task.X.value: of["x"], task.WIDTH.value: of["x"].shape[1],
        task.OUT.value: of["ids"], task.POST.value: of["weights"],
        task.EPS.value: float(of["rule"].factor), task.NORM_EPS.value: float(of["rule"].epsilon),
    }  # fmt: skip
    if of["bias"] is not None:
        fields[task.WEIGHT.value] = of["bias"]
    constants = routing_constants(of["rule"])
    return RowTask(task.ROUTE.value, fields | _of_places(of), of["x"].shape[1], constants, mail=_mail(of))


def _turns(of: dict[str, Any]) -> RowTask:
    fields = {
        task.X.value: of["frequencies"], task.OUT.value: of["out"], task.PAIRS.value: len(of["frequencies"]),
        task.RATIO.value: of["unit"], task.SPLITS.value: -1 if of["backwards"] else 1,
    }  # fmt: skip
    return RowTask(task.ROTATIONS.value, fields, len(of["frequencies"]))


_TASKS: dict[str, Callable[[dict[str, Any]], RowTask]] = {
    "latent": _latent,
    "pool": _pool,
    "mix": _mix,
    "route": _route,
    "weigh": _weigh,
    "turns": _turns,
}


def _elements(kind: int) -> Callable[[Places, dict[str, Any], int], list[Launch]]:
    def lower(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
        return [elements_launch(kind, of["x"], of.get("y"), of["out"], rows, of.get("number") or 0.0)]

    return lower


def _repeat(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    return [repeat_launch(of["x"], of["n"], of["out"], rows)]


def _engram(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    return [engram_launch(of["x"], of["kv"], of["qk"], of["eps"], of["out"], rows)]


def _heads(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    heads, x, out, weight = of["heads"], of["x"], of["out"], of["weight"]
    first, step, _ = of.get("at") or (0, weight.shape[2], weight.shape[2])
    to, out_step = of.get("to") or (0, weight.shape[1])
    beside = None
    if of.get("beside") is not None:
        copied, copied_step, width = of["beside"]
        beside = Columns(x, copied, copied_step), Columns(out, to + weight.shape[1], out_step), width
    columns = Columns(x, first, step), weight, Columns(out, to, out_step)
    return [head_products_launch(*columns, heads, rows, of["factor"], beside)]


def _move(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    first, step, width = of["at"]
    source, target = Columns(of["x"], first, step), Columns(of["out"], *of["to"])
    return [move_launch(source, target, of["heads"], width, rows, of["factor"])]


def _round(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    return [round_launch(of["x"], of["form"], of["out"], rows)]


def _choices(of: dict[str, Any]) -> Choices | None:
    if of.get("weights") is None:
        return None
    apart = of["mail"] if of["apart"] is None else of["apart"]  # where all are in the mail
    return Choices(apart, of["weights"], of.get("mail"), of.get("places"))


def _write(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    return [write_launch(of["x"], of["y"], of["post"], of["combine"], _choices(of), of["out"], rows)]


def _add_up(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    choices = _choices(of)
    assert choices is not None
    return [add_up_launch(of["y"], choices, of["out"], rows)]


def _attend(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    names = "q", "rings", "sink", "window", "entries", "chosen", "turns", "back", "parts", "stats", "out"
    given: dict[str, Any] = {name: of.get(name) for name in names}
    if of.get("every") is not None:
        latents = LatentAttention(**given, every=of["every"], scale=of["scale"])
        return list(latents.launches(places.step, rows, places.max_rows))
    attention = SparseAttention(**given)
    return list(attention.launches(places.step, rows, places.max_rows))


def _attend_kv(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    names = "q", "keys", "values", "window", "sinks", "scale", "parts", "stats", "out"
    given: dict[str, Any] = {name: of[name] for name in names}
    return list(KvAttention(**given).launches(places.step, rows, places.max_rows))


def _residual(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    given: dict[str, Any] = {name: of.get(name) for name in ("x", "y", "factor", "weight", "eps", "out")}
    return [Residual(**given, total=of["sum"], choices=_choices(of)).launch(rows)]


def _encode(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    return [encode_launch(of["x"], of["state"], places.step, rows, places.max_rows, of["ratio"])]


def _select(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    names = (
        "queries", "turns", "weights", "factor", "keys", "ratio", "block", "blocks", "pool", "chosen",
        "scores", "maxima", "best", "names", "best_blocks", "is_rounded",
    )  # fmt: skip
    given: dict[str, Any] = {name: of.get(name) for name in names}
    return Choice(**given).launches(places.step, rows, places.max_rows)


def _experts(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    slots = of["slots"]
    activation = of["limit"], of["extras"]
    held = of["x"], of["places"], of["ids"], of["inner"], of["apart"]
    return list(slots.launches(*held, activation, rows))


def _fetch(places: Places, of: dict[str, Any], rows: int) -> list[Launch]:
    given = of["table"], of["box_ids"], of["box_places"], of["inputs"], of["answerer"]
    return [fetch_launch(*given, of["x"], of["places"], rows)]


_ALONE: dict[str, Callable[[Places, dict[str, Any], int], list[Launch]]] = {
    "sum": _elements(SUM),
    "times": _elements(TIMES),
    "gated": _elements(GATED),
    "repeat": _repeat,
    "engram": _engram,
    "write": _write,
    "add_up": _add_up,
    "attend": _attend,
    "attend_kv": _attend_kv,
    "residual": _residual,
    "heads": _heads,
    "move": _move,
    "round": _round,
    "encode": _encode,
    "select": _select,
    "experts": _experts,
    "fetch": _fetch,
}
