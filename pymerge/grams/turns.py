"""Runs of a model on several batches that go through its blocks together, so that one block's weights are needed at a
time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_THREADS = 512  # of PyTorch, at most, over all runs: each starts a team of its own

Given = tuple[tuple[Any, ...], dict[str, Any]]


class VisitedTwiceError(Exception):
    """A block is run more than once: its inputs are known only at the end."""


class _StoppedError(BaseException):
    """Another run has failed: this one ends."""


class _Run:
    """One run, in a thread of its own that goes on only while `go` waits for it."""

    def __init__(self, work: Callable[[], None], threads: int) -> None:
        self.block: str | None = None  # before which it stands; None: it has ended
        self.given: Given = ((), {})  # what that block will be called with
        self.error: BaseException | None = None
        self._work = work
        self._threads = threads
        self._on, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._stop = False
        self._thread = threading.Thread(target=self._main, daemon=True)

    def go(self) -> None:
        """Go on to the next block, or to the end. Raises what the run has raised."""
        if self._thread.ident is None:
            self._thread.start()
        self._on.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End it where it stands."""
        if self._thread.is_alive():
            self._stop = True
            self._on.release()
            self._thread.join()

    def stand(self, block: str, given: Given) -> None:
        """Wait before a block; called by the run itself."""
        self.block, self.given = block, given
        self._back.release()
        self._on.acquire()
        self.given = ((), {})
        if self._stop:
            raise _StoppedError

    def _main(self) -> None:
        self._on.acquire()
        _current.run = self
        try:
            if not self._stop:
                torch.set_num_threads(self._threads)
                with torch.no_grad():
                    self._work()
        except _StoppedError:
            pass
        except BaseException as error:
            self.error = error
        self.block = None
        self._back.release()


class _Current(threading.local):
    run: _Run | None = None


_current = _Current()


class Passage:
    """The runs that stand before one block."""

    def __init__(self, block: str, module: nn.Module, runs: Sequence[_Run]) -> None:
        self._module, self._runs = module, runs
        self._standing = [number for number, run in enumerate(runs) if run.block == block]

    def try_out(self, numbers: Collection[int], after: Callable[[], None]) -> None:
        """Run the block on copies of what these runs, by their numbers, have for it; none goes on."""
        for number in self._standing:
            if number in numbers:
                arguments, named = copy.deepcopy(self._runs[number].given)
                self._module(*arguments, **named)
                after()

    def through(self, after: Callable[[], None]) -> None:
        """Let all runs through, one by one."""
        for number in self._standing:
            self._runs[number].go()
            after()


def run_by_blocks(
    works: Sequence[Callable[[], None]], blocks: Mapping[str, nn.Module], turn: Callable[[str, Passage], None]
) -> None:
    """Run all `works`, calls of one model, side by side, so that each block is passed by all before any comes to the
    next.

    Args:
        works: in the order in which they take their turns; one runs at a time.
        blocks: modules of the model, by name, of which none is inside another.
        turn: called for each block with its name and the runs before it, all of which it lets through.

    Raises:
        VisitedTwiceError: a run has come to a block again.
    """
    threads = max(1, min(torch.get_num_threads(), _THREADS // max(1, len(works))))
    runs = [_Run(work, threads) for work in works]
    passed: set[str] = set()
    with _standing(blocks):
        try:
            for run in runs:
                run.go()
            while waiting := [run for run in runs if run.block is not None]:
                block = waiting[0].block
                assert block is not None
                if block in passed:
                    raise VisitedTwiceError(f"{block} again")
                passed.add(block)
                turn(block, Passage(block, blocks[block], runs))
        finally:
            for run in runs:
                run.stop()


@contextmanager
def _standing(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Runs stop before each block for as long as this lasts."""

    def stop_at(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if _current.run is not None:
                _current.run.stand(name, (inputs, named))

        return hook

    hooks = [module.register_forward_pre_hook(stop_at(name), with_kwargs=True) for name, module in blocks.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
