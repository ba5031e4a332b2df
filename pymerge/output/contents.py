"""Files of tensors that a run writes, and which of them an earlier run has left whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pymerge.common.events import event
from pymerge.output.claim import State, partial_name, work_name
from pymerge.output.files import WORK_FOLDER
from pymerge.output.layout import ShardLayout, TensorLayout, full_name
from pymerge.output.shard import found_layout, is_whole


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


def drop_damaged(path: Path, contents: Contents, state: State) -> None:
    """Keep the shards whose size, header and checksums are as recorded, remove the others. Raises OSError."""
    work = path / WORK_FOLDER
    if state.finished:
        nbytes = sum(contents.size(file) for file in state.finished if file in contents.files)
        text = f"checking {len(state.finished)} finished shards ({nbytes:,} bytes) of an interrupted run"
        event("checking_shards", text, shards=sorted(state.finished), bytes=nbytes)
    for file in contents.files:
        (work / partial_name(file)).unlink(missing_ok=True)
        places = [work / work_name(file), *([path / file] if file in state.publishing else [])]
        layouts = [contents.layouts.get(file) or found_layout(place) for place in places]
        digests = state.finished.get(file, {})
        whole = [
            layout
            for place, layout in zip(places, layouts, strict=True)
            if layout is not None and is_whole(place, layout, digests)
        ]
        if whole and file in contents.late:
            contents.place(whole[0])
        if not whole:
            if state.finished.pop(file, None) is not None:
                text = f"{file}: was finished and is no longer as it was written; it is made again"
                event("shard_damaged", text, level=logging.WARNING, file=file)
            for place in places:
                place.unlink(missing_ok=True)
    state.save(work)
