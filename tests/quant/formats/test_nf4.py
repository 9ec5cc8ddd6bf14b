"""NF4 against bitsandbytes itself, which defines the format."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb

from quant.errors import FormatError
from quant.formats.nf4 import NF4, NF4_LEVELS, read_bitsandbytes
from quant.packed import PackedTensor


def bitsandbytes_tensors(
    values: torch.Tensor, *, double: bool = False, block: int = 64
) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores in a checkpoint for a weight named `w`."""
    codes, state = bnb.quantize_nf4(values, blocksize=block, compress_statistics=double)
    return {"w": codes, **{f"w.{key}": part for key, part in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_codes_and_scales_are_those_of_bitsandbytes(scale: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(48, 256) * scale
    values[3, 64:128] = 0
    values[4, 7] = 500 * scale
    codes, state = bnb.quantize_nf4(values, blocksize=64)
    packed = NF4.encode(values)
    assert torch.equal(packed.codes, codes.view(48, 128))
    assert packed.scales is not None
    assert torch.equal(packed.scales.flatten(), state.absmax)


def test_decoding_gives_what_bitsandbytes_gives() -> None:
    torch.manual_seed(1)
    codes, state = bnb.quantize_nf4(torch.randn(32, 128), blocksize=64)
    packed = PackedTensor(NF4, (32, 128), codes.view(32, 64), state.absmax.view(32, 2))
    assert torch.equal(packed.decode(), bnb.dequantize_nf4(codes, state))


def test_high_nibble_is_the_even_column() -> None:
    codes = torch.full((1, 32), 0x77, dtype=torch.uint8)
    codes[0, 0] = 0xF0
    values = PackedTensor(NF4, (1, 64), codes, torch.ones(1, 1)).decode()
    assert values[0, :3].tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("double", [False, True])
def test_checkpoint_of_bitsandbytes_is_read(double: bool) -> None:
    torch.manual_seed(2)
    values = torch.randn(96, 448)
    tensors = bitsandbytes_tensors(values, double=double)
    state = bnb.QuantState.from_dict(
        {key.removeprefix("w."): part.clone() for key, part in tensors.items() if key != "w"},
        torch.device("cpu"),
    )
    expected = bnb.dequantize_4bit(tensors["w"], state)
    torch.testing.assert_close(read_bitsandbytes(tensors, "w").decode(), expected, rtol=1e-6, atol=1e-7)


def test_missing_part_of_a_checkpoint_is_named() -> None:
    tensors = bitsandbytes_tensors(torch.randn(4, 64), double=True)
    del tensors["w.nested_quant_map"]
    with pytest.raises(FormatError, match=r"w\.nested_quant_map is missing"):
        read_bitsandbytes(tensors, "w")


@pytest.mark.parametrize(("shape", "block"), [((4, 96), 64), ((4, 128), 128)])
def test_blocks_that_straddle_rows_or_have_another_size_are_refused(
    shape: tuple[int, int], block: int
) -> None:
    tensors = bitsandbytes_tensors(torch.randn(shape), block=block)
    with pytest.raises(FormatError, match="whole blocks of 64"):
        read_bitsandbytes(tensors, "w")


def test_truncated_codes_are_refused() -> None:
    tensors = bitsandbytes_tensors(torch.randn(4, 64))
    tensors["w"] = tensors["w"][:-1]
    with pytest.raises(FormatError, match="127 bytes of codes, expected 128"):
        read_bitsandbytes(tensors, "w")


@pytest.mark.parametrize("state", [b"", b"[1]", b"{" * 100_000, b"\xff\xfe"])
def test_damaged_state_is_refused(state: bytes) -> None:
    tensors = bitsandbytes_tensors(torch.randn(4, 64))
    tensors["w.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(FormatError, match="damaged"):
        read_bitsandbytes(tensors, "w")


def test_other_level_tables_are_refused() -> None:
    tensors = bitsandbytes_tensors(torch.randn(4, 64))
    tensors["w.quant_map"] = tensors["w.quant_map"].flip(0)
    with pytest.raises(FormatError, match="the NF4 levels"):
        read_bitsandbytes(tensors, "w")


def test_every_value_goes_to_its_nearest_level() -> None:
    values = torch.linspace(-1.2, 1.2, 20_001)
    distance = (values.clamp(-1, 1).unsqueeze(1) - NF4_LEVELS).abs()
    chosen = (values.clamp(-1, 1) - NF4.nearest_levels(values)).abs()
    torch.testing.assert_close(chosen, distance.amin(1), rtol=0, atol=1e-7)
