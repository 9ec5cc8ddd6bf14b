"""Attention of a recorded step over keys and values of all heads, and the choice of experts by any rule, in
Triton's interpreter, against torch."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_triton.py", allow_module_level=True)

from quant.formats.kv import plain_rows
from quant.formats.kv_names import KvFormat
from quant.formats.rows import Rows, bytes_of, rows_in, stored_as, values_of
from quant.kernels.cpu.cache_notes import KvPlace
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.layers import RoutingRule
from quant.kernels.torch_layers import TorchLayers
from tests.quant.kernels.test_native_rows import values

TORCH, HERE = TorchLayers(), TritonKernels(torch.device("cpu"))
SLOTS, MAX_ROWS = 3, 4


def cache_of(heads: int, places: int, dim: int, kv_format: KvFormat) -> tuple[Rows, Rows]:
    """Keys and values as a cache's bank has them: views of one tensor, with other layers between slots."""
    form = plain_rows(kv_format, dim)
    width, dtype = stored_as(dim, form)
    bank = torch.zeros(2, 2, SLOTS, heads, places, width, dtype=dtype)
    keys, values_ = (rows_in(bank[side, 1], form) for side in range(2))
    return keys, values_


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "places", "window", "kv_format", "has_sinks"),
    [
        pytest.param(6, 2, 16, 100, None, "float32", False, id="groups"),
        pytest.param(4, 4, 24, 100, None, "float32", True, id="a key head each, with sinks"),
        pytest.param(40, 2, 32, 100, None, "fp8", False, id="more than a program's heads"),
        pytest.param(4, 2, 16, 48, 40, "float32", True, id="ring"),
        pytest.param(4, 2, 32, 100, None, "int8", False, id="int8"),
        pytest.param(4, 2, 32, 48, 40, "bf16", False, id="ring in bfloat16"),
    ],
)
def test_appended_rows_are_attended_to_as_in_torch(
    heads: int,
    kv_heads: int,
    dim: int,
    places: int,
    window: int | None,
    kv_format: KvFormat,
    has_sinks: bool,
) -> None:
    form = plain_rows(kv_format, dim)
    keys, values_ = cache_of(kv_heads, places, dim, kv_format)
    lengths, slots = [1, 99, 70], [2, 0, 1]
    fresh = [values(3, 100, kv_heads * dim, seed=seed) for seed in (1, 2)]
    for rows, state in zip(fresh, (keys, values_), strict=True):
        for slot, length, row in zip(
            slots, lengths, rows, strict=True
        ):  # all but the last one, as a prompt's
            for position in range(length - 1):
                encoded = TORCH.encode_rows(row[position].view(kv_heads, dim), form)
                bytes_of(state)[slot, :, position % places] = bytes_of(encoded)
    q, sinks = values(3, heads * dim, seed=3), values(heads, seed=4) if has_sinks else None

    recorder = GpuRecorder(HERE, MAX_ROWS)
    inputs = [recorder.input(width) for width in (heads * dim, kv_heads * dim, kv_heads * dim)]
    place = KvPlace(keys, values_, places if window else None)
    recorder.append(inputs[1], inputs[2], place)
    out = recorder.attend(inputs[0], place, window, sinks)
    program = recorder.finish(inputs[0], out)
    last = [torch.stack([row[n - 1] for row, n in zip(rows, lengths, strict=True)]) for rows in fresh]
    for buffer, rows in zip(inputs, (q, *last), strict=True):
        program.rows(buffer)[:3] = rows
    program.run(slots, [length - 1 for length in lengths])
    found = program.result
    for n, length in enumerate(lengths):
        held = [
            values_of(TORCH.encode_rows(rows[n, :length].view(length, kv_heads, dim), form)) for rows in fresh
        ]
        seen = [rows.transpose(0, 1) for rows in held]
        expected = TORCH.attend(q[n].view(1, heads, dim), seen[0], seen[1], window, sinks)
        assert (found[n] - expected.flatten()).abs().max() < 2e-6


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(4, "softmax", None, True),
        RoutingRule(6, "softmax"),
        RoutingRule(3, "sigmoid", None, True, 1e-20, 2.5),
        RoutingRule(3, "chosen softmax"),
        RoutingRule(4, "sigmoid", (4, 2, 2), True, 1e-20, 2.5),
        RoutingRule(3, "softmax", (4, 2, 1), False, 0.0, 16.0),
        RoutingRule(6, "sqrt softplus", None, True, 1e-20, 1.5),
    ],
    ids=lambda rule: f"{rule.score}{' in groups' if rule.groups else ''} {rule.top_k}",
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", ""])
def test_experts_are_chosen_as_in_torch(rule: RoutingRule, has_bias: bool) -> None:
    logits, bias = values(3, 20, seed=1) * 3, values(20, seed=2) if has_bias else None
    recorder = GpuRecorder(HERE, MAX_ROWS)
    given = recorder.input(20)
    ids, weights = recorder.route(given, bias, rule)
    recorder._kept.append(weights)
    program = recorder.finish(given, ids)
    program.source[:3] = logits
    program.run([0, 1, 2], [0, 0, 0])
    expected = TORCH.route(logits, bias, rule)
    assert torch.equal(program.result[:3], expected[0])
    assert program.result[3].tolist() == [-1] * rule.top_k  # is not alive
    torch.testing.assert_close(program.rows(weights)[:3], expected[1], atol=1e-6, rtol=1e-6)
