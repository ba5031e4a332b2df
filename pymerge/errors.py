"""Every error that pymerge raises on purpose. The CLI prints them as one line and exits with `exit_code`."""

from __future__ import annotations

from collections.abc import Iterable


class PymergeError(Exception):
    """Base class. The message says what is wrong, where (file, tensor, value), and what to do about it."""

    exit_code = 1


class ConfigError(PymergeError):
    """The config cannot be read: unknown key, misspelled method, missing or invalid parameter."""

    exit_code = 2


class CheckpointError(PymergeError):
    """An input file is missing, damaged, or changed while it was being read."""

    exit_code = 3


class PlanError(PymergeError):
    """The merge cannot be done as asked; `problems` lists everything that is wrong, the message what fits a screen."""

    exit_code = 4
    shown = 30

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = [f"- {problem}" for problem in self.problems[: self.shown]]
        if count > self.shown:
            lines.append(f"- and {count - self.shown} more of such problems")
        super().__init__(f"{head} found before anything was read:\n" + "\n".join(lines))

    def __reduce__(self) -> tuple[type[PlanError], tuple[list[str]]]:
        """The error for another process, which makes it of its problems."""
        return PlanError, (self.problems,)


class ArgumentError(PymergeError, ValueError):
    """An op or a Python API function was called with tensors or parameters that do not fit together."""

    exit_code = 5


class NonFiniteError(PymergeError):
    """An input tensor holds NaN or infinity; `found` is the message without a remedy that was given by itself."""

    exit_code = 6

    def __init__(self, found: str, remedy: str = "") -> None:
        self.found = found
        super().__init__(f"{found}; {remedy}" if remedy else found)


class BackendError(PymergeError):
    """A backend or device was asked for by name and cannot run here."""

    exit_code = 7


class OutputError(PymergeError):
    """The output directory cannot be used, or writing to it failed."""

    exit_code = 8


class OutOfMemoryError(PymergeError):
    """A step did not fit into memory, nor did it in smaller blocks."""

    exit_code = 9
