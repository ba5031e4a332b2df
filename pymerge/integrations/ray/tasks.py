"""Tasks on a node of a Ray cluster: the plan of a merge, or one file of it. They return errors: no second try helps.

What they are given is pickled, so that versions are compared before anything of pymerge's is unpickled.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge import api, env
from pymerge.config.merge_config import MergeConfig
from pymerge.engine.assignment import Assignment, pack
from pymerge.engine.report import MergeReport
from pymerge.engine.run import processor
from pymerge.errors import BackendError, PlanError, PymergeError
from pymerge.integrations.ray.cluster import node_name

_INTERVAL = 1.0  # seconds between two reports on progress


@dataclass(frozen=True)
class Planned:
    """A plan, pickled, and the identity of its merge on the node that has planned it."""

    plan: bytes
    identity: dict[str, str]


class Board:
    """Progress of all tasks, as an actor of no processor."""

    def __init__(self) -> None:
        self._count, self._name = 0, ""

    def add(self, count: int, name: str) -> None:
        """So many more bytes have been read or written; this tensor is being computed."""
        self._count += count
        self._name = name

    def take(self) -> tuple[int, str]:
        """Bytes since the last call, and the name of a tensor."""
        count, self._count = self._count, 0
        return count, self._name


class _Reporter:
    """Reporter of a task's progress to the board, seldom."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._lock = threading.Lock()
        self._count, self._sent, self._name = 0, time.monotonic(), ""

    def start(self, total: int) -> None: ...

    def tensor(self, name: str) -> None:
        self._name = name

    def advance(self, count: int) -> None:
        with self._lock:
            self._count += count
            if time.monotonic() - self._sent > _INTERVAL:
                self._send()

    def close(self) -> None:
        with self._lock:
            self._send()

    def _send(self) -> None:
        self._sent = time.monotonic()
        count, self._count = self._count, 0
        self._board.add.remote(count, self._name)


def plan_here(
    version: str, folder: str, config: bytes, options: Mapping[str, Any]
) -> tuple[Planned | PymergeError, str]:
    """Plan a merge on this node, for nodes like it; the second is the node's name."""
    try:
        _agree(version, folder)
        loaded: MergeConfig = pickle.loads(config)
        plan = api.plan(loaded, **options)
        return Planned(pack(plan), plan.identity(processor(plan))), node_name()
    except PymergeError as error:
        return _named(error), node_name()


def merge_here(
    version: str, folder: str, plan: bytes, out: str, file: str, device: str, memory: int, board: Any
) -> tuple[MergeReport | PymergeError, str]:
    """Merge one file of a plan on this node; the second is the node's name."""
    try:
        _agree(version, folder)
        assignment = Assignment(plan, Path(out), (file,), device, memory)
        return assignment.carry_out(_Reporter(board)), node_name()
    except PymergeError as error:
        return _named(error), node_name()


def _agree(version: str, folder: str) -> None:
    """Raise BackendError where this node has another version; go to the folder that relative paths are relative to."""
    own = env.version()
    if own != version:
        raise BackendError(f"has pymerge {own}, and this merge is by {version}; install the same version on all nodes")
    with suppress(OSError):  # where a path is relative, the error names it
        os.chdir(folder)


def _named(error: PymergeError) -> PymergeError:
    """The error with the node in front."""
    where = f"node {node_name()}: "
    if isinstance(error, PlanError):
        return PlanError([where + problem for problem in error.problems])
    error.args = (f"{where}{error}",)
    return error
