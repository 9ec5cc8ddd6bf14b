"""GPUs in name only, for families' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.pretend_gpus import pretend_gpus


@pytest.fixture
def gpus() -> Iterator[tuple[torch.device, torch.device]]:
    with pretend_gpus() as both:
        yield both
