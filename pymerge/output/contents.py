"""Files of tensors that a run writes, and which of them an earlier run has left whole."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pymerge.common.events import event
from pymerge.output.files import WORK_FOLDER
from pymerge.output.layout import ShardLayout, TensorLayout, full_name
from pymerge.output.records import Record
from pymerge.output.shard import found_layout, has_header, is_whole
from pymerge.output.work import work_name


class Contents:
    """Layouts of the files that a run writes: those of the model, others beside it, and late ones.

    `late` maps the names of files whose content is not known yet to the bytes to set aside for them; they get their
    layout by `place`. So do those of `interim`, which are never published.
    """

    def __init__(
        self,
        model: Sequence[ShardLayout],
        beside: Sequence[ShardLayout],
        late: Mapping[str, int],
        interim: Mapping[str, int],
    ) -> None:
        self.late = {**late, **interim}
        self.files = [*(layout.file for layout in (*model, *beside)), *self.late]
        self._interim = frozenset(interim)
        self.layouts: dict[str, ShardLayout] = {}
        self.places: dict[str, tuple[ShardLayout, TensorLayout]] = {}  # by full names of tensors
        self._model = len(model)
        for layout in (*model, *beside):
            self.place(layout)

    @property
    def beside(self) -> tuple[ShardLayout, ...]:
        """Layouts of the files that are not the model's, in their order; of late ones those that are settled."""
        published = (file for file in self.files[self._model :] if file not in self._interim)
        return tuple(self.layouts[file] for file in published if file in self.layouts)

    def place(self, layout: ShardLayout) -> None:
        """Take the layout of a file."""
        self.layouts[layout.file] = layout
        self.places |= {full_name(layout.file, tensor.name): (layout, tensor) for tensor in layout.tensors}

    def size(self, file: str) -> int:
        """Bytes of a file; as far as they are known, of a late one."""
        return self.layouts[file].nbytes if file in self.layouts else self.late[file]


def find_whole(
    path: Path, contents: Contents, files: Collection[str], publishing: Collection[str], records: Mapping[str, Record]
) -> dict[str, Record]:
    """The records of those of these files that are as recorded, by size, header and checksums. Raises OSError.

    They are in the work folder, or, where they were being published, at their place. Late ones get their layouts.
    """
    found = [file for file in files if file in records]
    if found:
        nbytes = sum(contents.size(file) for file in found)
        text = f"checking {len(found)} finished shards ({nbytes:,} bytes) of an interrupted run"
        event("checking_shards", text, shards=sorted(found), bytes=nbytes)
    whole = {}
    for file in found:
        for place in places(path, file, publishing):
            layout = contents.layouts.get(file) or found_layout(place)
            if layout is not None and is_whole(place, layout, records[file].tensors):
                whole[file] = records[file]
                if file not in contents.layouts:
                    contents.place(layout)
                break
        else:
            _tell_damaged(file)
    return whole


def find_present(
    path: Path, contents: Contents, publishing: Collection[str], records: Mapping[str, Record]
) -> dict[str, Record]:
    """The records of files that are as recorded by size and header alone: nothing is read again. Raises OSError."""
    found = {}
    for file, record in records.items():
        layout = contents.layouts[file]
        if any(has_header(place, layout, record.tensors) for place in places(path, file, publishing)):
            found[file] = record
        else:
            _tell_damaged(file)
    return found


def places(path: Path, file: str, publishing: Collection[str]) -> list[Path]:
    """Paths at which a whole file may lie."""
    return [path / WORK_FOLDER / work_name(file), *([path / file] if file in publishing else [])]


def _tell_damaged(file: str) -> None:
    text = f"{file}: was finished and is no longer as it was written; it is made again"
    event("shard_damaged", text, level=logging.WARNING, file=file)
