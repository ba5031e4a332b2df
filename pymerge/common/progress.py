"""Progress of long work: bytes done, the tensor at hand, time left."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressSink(Protocol):
    """Listener to the engine's progress. Calls may come from several threads."""

    def start(self, total: int) -> None:
        """Work begins; `total` bytes will be read and written."""

    def tensor(self, name: str) -> None:
        """This tensor is being computed now."""

    def advance(self, count: int) -> None:
        """`count` more bytes have been read or written."""

    def close(self) -> None:
        """Work has ended, well or not."""


class NoProgress:
    """Shows nothing."""

    def start(self, total: int) -> None: ...

    def tensor(self, name: str) -> None: ...

    def advance(self, count: int) -> None: ...

    def close(self) -> None: ...


class ProgressBar:
    """A bar on the terminal (standard error)."""

    def __init__(self, title: str) -> None:
        self._bar = Progress(
            TextColumn(title),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tensor]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(title, total=None, tensor="")

    def start(self, total: int) -> None:
        self._bar.update(self._task, total=total)
        self._bar.start()

    def tensor(self, name: str) -> None:
        self._bar.update(self._task, tensor=name)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def close(self) -> None:
        self._bar.stop()


class CountBar:
    """A bar of things done, of so many, on the terminal (standard error). It is a context, for as long as it shows."""

    def __init__(self, title: str, total: int, *, shown: bool = True) -> None:
        left = TextColumn("ETA"), TimeRemainingColumn()
        columns = TextColumn(title), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), *left
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> CountBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        self._bar.advance(self._task)
