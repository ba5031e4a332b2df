"""Graphs of kernels: on which stream they are captured, and what others may do meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pymerge.kernels import wudi_adam

POOL = 32  # streams of a priority that PyTorch hands out, one after the other and then again


class FakeStreams:
    """PyTorch's pools of streams: two priorities, streams by number."""

    def __init__(self) -> None:
        self._handed_out = {0: 0, -1: 0}
        self.captured: list[tuple[int, int]] = []
        self.current: tuple[int, int] | None = None

    def Stream(self, device: object = None, priority: int = 0) -> tuple[int, int]:
        number = self._handed_out[priority]
        self._handed_out[priority] += 1
        return priority, number % POOL

    @contextmanager
    def stream(self, stream: tuple[int, int]) -> Iterator[None]:
        self.current = stream
        yield
        self.current = None

    def CUDAGraph(self) -> FakeStreams:
        return self

    def capture_begin(self, capture_error_mode: str) -> None:
        assert self.current is not None
        assert capture_error_mode == "thread_local"
        self.captured.append(self.current)

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...

    def current_device(self) -> int:
        return 0


def test_no_graph_is_captured_on_a_stream_that_others_copy_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their copies would be recorded instead of done."""
    streams: Any = FakeStreams()
    for name in ("Stream", "stream", "CUDAGraph", "current_device"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    wudi_adam.capture_stream.cache_clear()
    copying = [streams.Stream() for _ in range(2)]
    for _ in range(2 * POOL):
        wudi_adam.capture(lambda: None)
    wudi_adam.capture_stream.cache_clear()
    assert len(streams.captured) == 2 * POOL
    assert len(set(streams.captured)) == 1
    assert not set(streams.captured) & set(copying)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_keeps_the_stream_of_captures_apart() -> None:
    capturing = wudi_adam.capture_stream(torch.cuda.current_device()).cuda_stream
    assert capturing not in {torch.cuda.Stream().cuda_stream for _ in range(2 * POOL)}
