"""The native back end's threads: the same bits whoever computes, from wherever it is called."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quant.formats.mxfp4 import MXFP4
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.recorder import Recorder
from tests.quant.kernels.kernel_cases import weight

if library.library_path() is None:
    pytest.skip("the compiled kernels were not built", allow_module_level=True)

WEIGHT = weight(MXFP4, 1024, 512)
X = torch.randn(3, 512)


def product(threads: int) -> torch.Tensor:
    kernels = NativeKernels(threads=threads)
    return kernels.linear(X, kernels.prepare(WEIGHT))


@pytest.mark.parametrize("threads", [2, 3, 16, 400])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    alone = product(1)
    for _ in range(50):
        assert torch.equal(product(threads), alone)


def test_calls_of_several_threads_at_once_do_not_disturb_each_other() -> None:
    alone = product(1)
    with ThreadPoolExecutor(6) as callers:
        for found in callers.map(product, [2] * 300):
            assert torch.equal(found, alone)


def test_a_program_and_products_of_other_threads_do_not_disturb_each_other() -> None:
    kernels = NativeKernels(threads=2)
    matrix = kernels.prepare(WEIGHT)
    recorder = Recorder(kernels, len(X))
    source = recorder.input(512)
    (y,) = recorder.linears(source, [matrix])
    (result,) = recorder.linears(recorder.norm(y, None, 1e-6), [torch.eye(1024)])
    program = recorder.finish(source, result)
    rows = list(range(len(X)))

    def step() -> torch.Tensor:
        program.source[:] = X
        program.run(rows, rows)
        return program.result.clone()

    alone, expected = product(1), step()

    with ThreadPoolExecutor(3) as callers:
        products = callers.map(product, [2] * 200)
        for _ in range(200):
            assert torch.equal(step(), expected)
        assert all(torch.equal(found, alone) for found in products)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be kept on cores here")
def test_a_caller_that_may_use_one_core_alone_computes_alone() -> None:
    def on_one_core() -> torch.Tensor:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return product(4)

    with ThreadPoolExecutor(1) as caller:
        assert torch.equal(caller.submit(on_one_core).result(), product(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_computes_without_the_threads_of_its_parent() -> None:
    alone = product(2)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(2), alone) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
