"""Extras: files of an output beside the merged model, of tensors that are made from the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pymerge.output.layout import ShardLayout
from pymerge.planner.steps import Step


def no_files(beside: Sequence[ShardLayout]) -> dict[str, bytes]:
    """The small files of an output that has none."""
    return {}


@dataclass(frozen=True)
class Extras:
    """Files beside the merged model. They are made after it, on the CPU, under the same lock.

    `layouts` and `late` are their files of tensors as `OutputDirectory` takes them, `changeable` those that may get
    other values later. `files` gives small files, from the layouts of all that has been written; the last of them makes
    the output whole.
    """

    steps: tuple[Step, ...] = ()  # of actions that encode, file after file
    layouts: tuple[ShardLayout, ...] = ()
    late: Mapping[str, int] = field(default_factory=dict)
    changeable: tuple[str, ...] = ()
    identity: Mapping[str, str] = field(default_factory=dict)  # what decides their bytes, by name
    note: str = ""  # what the model card says about them
    files: Callable[[Sequence[ShardLayout]], dict[str, bytes]] = no_files

    @property
    def bytes_read(self) -> int:
        """Bytes that are read for them."""
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_written(self) -> int:
        """Bytes of their tensors, at most."""
        return sum(step.nbytes for step in self.steps)
