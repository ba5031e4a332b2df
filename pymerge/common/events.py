"""Events of a merge, by the standard logger "pymerge", and as lines of JSON in a file.

docs/logging.md lists the events and their fields.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from pymerge.errors import OutputError

logger = logging.getLogger("pymerge")
# Without any handler Python would print warnings itself; who wants to see events adds a handler.
logger.addHandler(logging.NullHandler())


def event(name: str, text: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event: `text` for people, `name` and `fields` (what JSON can hold, or has a text form) for programs."""
    logger.log(level, "%s", text, extra={"event": name, "fields": fields})


class _JsonHandler(logging.Handler):
    """Writes each event at once, as one JSON object a line: time (UTC), level, event, message, the event's fields.

    A log that can no longer be written stops the run: it was asked for.
    """

    def __init__(self, stream: io.FileIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        line = {
            # Of writing, one line after the other: threads make records that come here in another order.
            "time": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        data = (json.dumps(line, default=str) + "\n").encode()
        try:
            while data:
                data = data[self._stream.write(data) :]
        except OSError as error:
            raise OutputError(
                f"{self._stream.name}: the log cannot be written ({error.strerror}); free some space or give another "
                "--log-json, and run the same command again"
            ) from error


@contextmanager
def recording(target: str | None, *, verbose: bool = False) -> Iterator[None]:
    """Record events during a block.

    Args:
        target: file to which lines of JSON are appended, "-" for standard error, None for none.
        verbose: also write events as text to standard error, but for those of single steps.

    Raises:
        OutputError: the file cannot be opened or written.
    """
    handlers: list[logging.Handler] = []
    if verbose:
        handlers.append(logging.StreamHandler())
        handlers[0].setLevel(logging.INFO)
        handlers[0].setFormatter(logging.Formatter("%(name)s: %(message)s"))
    stream = None if target is None else _open(target)
    if stream is not None:
        handlers.append(_JsonHandler(stream))
    before = logger.level
    if handlers:
        logger.setLevel(logging.INFO if stream is None else logging.DEBUG)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        with suppress(OutputError):  # of the log itself: what went wrong first is what is to be told
            event("error", str(error), level=logging.ERROR, error=type(error).__name__)
        raise
    finally:
        logger.setLevel(before)
        for handler in handlers:
            logger.removeHandler(handler)
        if stream is not None:
            stream.close()


def _open(target: str) -> io.FileIO:
    try:
        return io.FileIO(2, "a", closefd=False) if target == "-" else io.FileIO(target, "a")
    except OSError as error:
        raise OutputError(f"{target}: cannot be opened for the log ({error.strerror}); give another file") from error
