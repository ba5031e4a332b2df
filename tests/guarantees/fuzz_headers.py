"""Coverage-guided fuzzing of the two parsers that read untrusted text: safetensors headers and shard indexes.

    pip install atheris
    python tests/guarantees/fuzz_headers.py [-max_total_time=600] [other options of libFuzzer] [CORPUS]

Anything but a CheckpointError that names the file is a finding, and so is a header that is accepted although
its tensors do not lie inside the file, or although the safetensors library refuses it. The run stops at the
first finding and writes the input that caused it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import atheris
from safetensors import SafetensorError, deserialize

with atheris.instrument_imports(include=["pymerge.checkpoint"]):
    from pymerge.checkpoint.checkpoint import open_checkpoint
    from pymerge.checkpoint.safetensors_file import Header, read_header
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.errors import CheckpointError

SHARDS = ("a.safetensors", "b.safetensors")
GOOD: dict[str, object] = {
    "__metadata__": {"format": "pt"},
    "x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "y": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "z": {"dtype": "U8", "shape": [0, 7], "data_offsets": [26, 26]},
}
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a.safetensors.w": SHARDS[0], "b.safetensors.w": SHARDS[1]}}
RAW, TEXT, LISTED = 0, 1, 2  # a whole file; a header whose length and data fit it; an index
DATA_BYTES = 26


def file_of(text: bytes, data_bytes: int) -> bytes:
    """A safetensors file with this header."""
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


class Target:
    """Feeds inputs to the parsers by way of files in a folder in memory."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "model.safetensors"
        self.model = folder / "model"
        self.model.mkdir()
        for shard in SHARDS:
            header = {f"{shard}.w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
            (self.model / shard).write_bytes(file_of(json.dumps(header).encode(), 4))
        self.index = self.model / "model.safetensors.index.json"

    def __call__(self, data: bytes) -> None:
        kind, body = data[0] % 3 if data else RAW, data[1:]
        path = self.index if kind == LISTED else self.file
        path.write_bytes(file_of(body, DATA_BYTES) if kind == TEXT else body)
        said = str(path)  # what an error must name
        try:
            if kind == LISTED:
                opened = open_checkpoint(self.model)
                listed = json.loads(body.decode())["weight_map"]
                assert listed == {name: entry.file.name for name, entry in opened.tensors.items()}
            else:
                check(read_header(path), path.read_bytes())
        except CheckpointError as error:
            said = str(error)
        assert str(self.model if kind == LISTED else path) in said


def check(header: Header, content: bytes) -> None:
    """What an accepted header promises, and that the safetensors library accepts it too."""
    position = 8 + header.header_bytes
    for entry in header.entries.values():
        assert entry.offset == position
        assert entry.nbytes == entry.numel * ITEM_SIZES[entry.dtype]
        position += entry.nbytes
    assert position == len(content) == header.file_bytes
    try:
        theirs = dict(deserialize(content))
    except SafetensorError as error:
        raise AssertionError("accepted here, refused by safetensors") from error
    assert {name: (each["dtype"], tuple(each["shape"])) for name, each in theirs.items()} == {
        entry.name: (entry.dtype, entry.shape) for entry in header.entries.values()
    }


def seeds(folder: Path) -> None:
    """Valid inputs of each kind, from which the fuzzer starts."""
    text = json.dumps(GOOD).encode()
    (folder / "raw").write_bytes(bytes([RAW]) + file_of(text, DATA_BYTES))
    (folder / "text").write_bytes(bytes([TEXT]) + text)
    (folder / "index").write_bytes(bytes([LISTED]) + json.dumps(INDEX).encode())


def main() -> None:
    """Run libFuzzer's loop with the options of the command line."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as work:
        corpus = Path(work, "corpus")
        corpus.mkdir()
        seeds(corpus)
        words = Path(work, "words")
        known = ["__metadata__", "dtype", "shape", "data_offsets", "weight_map", "\\ud800", *ITEM_SIZES, *SHARDS]
        words.write_text("".join(f'"{word}"\n'.replace("\\u", "\\\\u") for word in known))
        target = Target(Path(work))
        atheris.Setup([*sys.argv, f"-dict={words}", "-timeout=10", str(corpus)], lambda data: target(data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
