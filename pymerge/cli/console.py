"""Consoles, errors as one line and an exit code."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from pymerge.errors import ArgumentError, PymergeError

# In a file or a pipe, wide enough that tables keep one line a row.
OUT = Console(width=None if sys.stdout.isatty() else 160)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
_INTERRUPTED = 130
_TERMINATED = 143


class _TerminatedError(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt no Exception, so that nothing on its way up holds it."""


@contextmanager
def reported(again: str = "goes on where this one stopped") -> Iterator[None]:
    """Errors as one line and an exit code; signals as a clean stop. `again` says what the same command then does."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _TerminatedError

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except PymergeError as error:
        ERR.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        ERR.print(f"interrupted; the same command {again}", markup=False)
        raise SystemExit(_INTERRUPTED) from None
    except _TerminatedError:
        ERR.print(f"terminated; the same command {again}", markup=False)
        raise SystemExit(_TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Warnings, on standard error."""
    for warning in warnings:
        ERR.print(f"warning: {warning}", style="yellow", markup=False)


def print_lines(lines: Iterable[str]) -> None:
    """Lines for people, as they are."""
    for line in lines:
        OUT.print(line, markup=False, highlight=False, soft_wrap=True)


def print_report(report: Any, *, quiet: bool, verbose: bool = False) -> None:
    """A report: warnings, what it says, and which tensors were slow; nothing if the user wants quiet."""
    if not quiet:
        print_warnings(report.warnings)
        print_lines([*report.lines(), *(report.slowest_lines() if verbose else ())])


def tensor_count(option: str, text: str, least: int) -> int | None:
    """A number of tensors, at least `least`; None for all."""
    if text == "all":
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise ArgumentError(f"{option} is {text!r}; give a number of tensors, or all")
    return int(text)
