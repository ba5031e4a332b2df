"""Parts of the work: some targets each, kept in a file of their own when they are measured, until all are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import Header, TensorEntry
from pymerge.common.dtypes import code_of
from pymerge.extraction.measure import Measured
from pymerge.extraction.targets import TensorPair
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_file

# Bytes of the tensors of a part, of both models: so much is done again at most, and a sync costs little beside it.
PART_BYTES = 2**28
_NOTES = "measured"  # the tensor of what is known of each target, as JSON


@dataclass(frozen=True)
class Portion:
    """Targets that are measured together, and the interim file that keeps what is found."""

    file: str
    targets: tuple[TensorPair, ...]

    def of(self, experts: Mapping[str, TensorEntry]) -> Portion:
        """The part with other experts of some targets, by their names."""
        changed = (replace(target, expert=experts.get(target.name, target.expert)) for target in self.targets)
        return replace(self, targets=tuple(changed))


def divide(targets: Sequence[TensorPair], stem: str) -> list[Portion]:
    """The targets in their order as parts, which follow from the headers alone."""
    groups: list[list[TensorPair]] = []
    used = 0
    for target in targets:
        if not groups or used + target.bytes_read > PART_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(target)
        used += target.bytes_read
    names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [Portion(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def keep(part: Portion, found: Sequence[Measured[torch.Tensor]], output: OutputDirectory) -> None:
    """Write what was found of a part's targets."""
    notes = json.dumps([[each.total, each.lost, each.algorithm] for each in found]).encode()
    tensors = {_NOTES: torch.frombuffer(bytearray(notes), dtype=torch.uint8)}
    for number, each in enumerate(found):
        for matrix, pair in enumerate(each.pairs):
            tensors |= dict(zip(_names(number, matrix), pair, strict=True))
    output.settle(
        layout_file(part.file, [(name, code_of(each.dtype), tuple(each.shape)) for name, each in tensors.items()])
    )
    for name, tensor in tensors.items():
        output.write(name, tensor)


def kept(part: Portion, header: Header, reader: Reader) -> Iterator[Measured[TensorEntry]]:
    """Result for a part's targets, their factors in the file with this header."""
    entries = header.entries
    notes = json.loads(reader.read_bytes(entries[_NOTES]))
    for number, (target, (total, lost, algorithm)) in enumerate(zip(part.targets, notes, strict=True)):
        pairs: list[tuple[TensorEntry, TensorEntry]] = []
        while (names := _names(number, len(pairs)))[0] in entries:
            pairs.append((entries[names[0]], entries[names[1]]))
        yield Measured(target, total, lost, tuple(pairs), algorithm)


def _names(number: int, matrix: int) -> tuple[str, str]:
    """Names of the left and right factors of a matrix of a target."""
    return f"{number}.{matrix}.left", f"{number}.{matrix}.right"
