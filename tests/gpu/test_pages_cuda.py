"""Memory of a GPU that is taken in pages as sequences grow, behind fixed addresses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (extra `gpu`)")

from engine.cache.pages import Pages
from memory.pages.cuda_space import page_bytes, pages_work

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
DIM = 512


def taken() -> int:
    """Bytes of the GPU's memory that are in use, but for what torch keeps to use again."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(GPU)
    return total - free


def test_pages_work() -> None:
    assert pages_work(GPU)


def test_a_sequence_takes_its_pages_of_the_gpu_and_gives_them_back() -> None:
    pages = Pages(4)
    rows = pages.reserve((4, 1 << 20, DIM), slot_axis=0, ratio=1, device=GPU)
    before, tokens = taken(), 100_000
    pages.hold(2, tokens)
    assert pages.held_bytes(2) == -(-tokens * DIM * 4 // page_bytes(GPU)) * page_bytes(GPU)
    assert taken() - before == pytest.approx(pages.taken_bytes, rel=0.02)
    values = torch.randn(tokens, DIM, device=GPU)
    rows[2, :tokens] = values
    pages.hold(2, 2 * tokens)
    assert torch.equal(rows[2, :tokens], values), "what is there stays where it is"
    assert int(rows[2, tokens : 2 * tokens].count_nonzero()) == 0
    kept = values[:4096].cpu()
    del values
    before, held = taken(), pages.taken_bytes
    pages.release(2)
    assert before - taken() == pytest.approx(held - pages.taken_bytes, abs=page_bytes(GPU))
    assert torch.equal(rows[2, :4096].cpu(), kept)


def test_rows_without_pages_read_as_zeros_and_any_thread_may_take_them() -> None:
    pages = Pages(2)
    rows = pages.reserve((2, 1 << 20, DIM), slot_axis=0, ratio=1, device=GPU)
    assert int(rows[1, -4096:].count_nonzero()) == 0
    with ThreadPoolExecutor(1) as other:
        other.submit(pages.hold, 1, 4096).result()
    rows[1, :4096] = 1.0
    assert int(rows[1, :8192].count_nonzero()) == 4096 * DIM
    assert int(rows[0, :4096].count_nonzero()) == 0
