"""Settings of all tests: threads, Triton's interpreter where there is no GPU, and memory that starts as NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:
    # Other processes have the other cores; read when PyTorch is imported, and by processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so before anything imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch.empty returns NaN in deterministic mode: what a kernel forgets to write cannot look right by luck.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads would wait for each other longer than small sizes take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
