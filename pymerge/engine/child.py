"""A process that merges files of a plan for another one: an assignment comes by standard input, messages go back.

`python -m pymerge.engine.child` is started by pymerge.engine.processes. It ends when the input does, so that it does
not outlive who started it.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import struct
import sys
import threading
import time
from types import FrameType
from typing import IO, Any, NoReturn

from pymerge.common.events import logger
from pymerge.errors import PymergeError

_LENGTH = struct.Struct(">Q")
_INTERVAL = 0.1  # seconds between two messages on progress


def put(stream: IO[bytes], message: Any) -> None:
    """Write a message."""
    data = pickle.dumps(message)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def take(descriptor: int) -> Any:
    """Read the next message; None at the end, also where that is inside of one."""
    head = _read(descriptor, _LENGTH.size)
    data = _read(descriptor, _LENGTH.unpack(head)[0]) if head else None
    return None if data is None else pickle.loads(data)


def _read(descriptor: int, count: int) -> bytes | None:
    parts = []
    while count:
        parts.append(os.read(descriptor, min(count, 1 << 20)))
        if not parts[-1]:
            return None
        count -= len(parts[-1])
    return b"".join(parts)


class Sender(logging.Handler):
    """Sender of progress and events to who started this process: tuples that begin with what they are."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream
        self._sending = threading.Lock()
        self._count, self._sent, self._name = 0, 0.0, ""

    def send(self, *message: Any) -> None:
        with self._sending:
            put(self._stream, message)

    def start(self, total: int) -> None:
        self.send("total", total)

    def tensor(self, name: str) -> None:
        self._name = name

    def advance(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._sent > _INTERVAL:
            self.close()

    def close(self) -> None:
        self._sent = time.monotonic()
        count, self._count = self._count, 0
        self.send("progress", count, self._name)

    def emit(self, record: logging.LogRecord) -> None:
        event, fields = getattr(record, "event", "message"), getattr(record, "fields", {})
        self.send("event", event, record.getMessage(), record.levelno, fields)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _end_with_input() -> None:
    """Wait for the end of the input, and end. A file of Python would hold a lock when the interpreter ends."""
    while os.read(0, 1 << 16):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Read an assignment, carry it out, and say how it went; returns the exit code."""
    sender = Sender(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what a library prints is no message
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who started this process ends it
    signal.signal(signal.SIGTERM, _terminate)
    given = take(0)
    if given is None:
        return 0
    assignment, level = given
    threading.Thread(target=_end_with_input, daemon=True).start()
    logger.addHandler(sender)
    logger.setLevel(level)
    try:
        report = assignment.carry_out(sender)
    except PymergeError as error:
        sender.send("error", error)
    except SystemExit as end:
        return int(end.code or 0)
    else:
        sender.send("done", report)
    return 0


if __name__ == "__main__":
    ended = main()
    sys.stderr.flush()
    os._exit(ended)  # all is said: nobody waits for libraries to clear up, and no signal comes in between
