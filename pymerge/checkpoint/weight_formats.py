"""Formats of weight files: their names, in the order in which loaders look for them, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pymerge.checkpoint.safetensors_file import Header, read_header
from pymerge.errors import CheckpointError

_FLAGS = {".h5": "from_tf", ".msgpack": "from_flax"}
_SHARD = re.compile(r"-(\d+)-of-(\d+)(\.|$)")


@dataclass(frozen=True)
class WeightFormat:
    """Names of a kind of weight files, and how it is read: `stem` is that of the usual single file and of the index.

    `index_first` says that the loader takes the index where both are there.
    """

    stem: str
    suffixes: tuple[str, ...]  # the first is that of single file and shards
    read: Callable[[Path], Header]
    index_first: bool = False

    @property
    def single(self) -> str:
        """The usual name of a single file."""
        return self.stem + self.suffixes[0]

    @property
    def index(self) -> str:
        """The usual name of the index of shards."""
        return f"{self.single}.index.json"

    def is_index(self, name: str) -> bool:
        """Whether a name is that of an index of such files, of any stem and variant (fp16, ...)."""
        return re.search(rf"{re.escape(self.suffixes[0])}(\.[^.]+)?\.index(\.[^.]+)?\.json$", name) is not None


def _read_torch_header(path: Path) -> Header:
    """Imports PyTorch, for which merges of safetensors files do not wait."""
    from pymerge.checkpoint.torch_file import read_torch_header

    return read_torch_header(path)


def _read_gguf(path: Path) -> Header:
    """Imports gguf, and numpy with it."""
    try:
        from pymerge.checkpoint.gguf.file import read_gguf
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "gguf":
            raise
        raise CheckpointError(
            f"{path}: is read with gguf, which is not here; pip install 'pymerge-engine[gguf]'"
        ) from error
    return read_gguf(path)


def _read_distcp(path: Path) -> Header:
    """Imports PyTorch with torch.distributed.checkpoint."""
    from pymerge.checkpoint.distcp.header import read_distcp

    return read_distcp(path)


_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# In the order of transformers, and then of diffusers.
LOADED = (
    WeightFormat("model", (".safetensors",), read_header),
    WeightFormat("pytorch_model", _TORCH_SUFFIXES, _read_torch_header),
    WeightFormat("diffusion_pytorch_model", (".safetensors",), read_header, index_first=True),
    WeightFormat("diffusion_pytorch_model", _TORCH_SUFFIXES, _read_torch_header, index_first=True),
)
# Formats in which a file may have any name; the last is PyTorch Lightning's.
NAMELESS = (*LOADED[:2], WeightFormat("model", (".ckpt",), _read_torch_header))
# A file on this machine alone: a repository has one for each of its many encodings.
GGUF = WeightFormat("model", (".gguf",), _read_gguf)
# What a training with torch.distributed.checkpoint leaves: the file of this name says what lies where in the others.
DISTCP = WeightFormat("model", (".metadata",), _read_distcp)
DISTCP_METADATA = ".metadata"


def how_to_convert(name: str) -> str:
    """Remedy for a weight file that cannot be read, by its suffix."""
    if name.endswith(".distcp"):
        return f"give the folder that it lies in, with its {DISTCP_METADATA}"
    flag = _FLAGS.get(Path(name.removesuffix(".index.json")).suffix)
    if flag:  # the last version that reads them
        return f"convert it with transformers 4 (from_pretrained(..., {flag}=True), then save_pretrained)"
    if name.endswith(".nemo"):
        return "convert it with NeMo's converters to transformers; an adapter, when it is merged into its model there"
    return "give the model that it was made of, in safetensors or as a file of torch.save"


def format_of(path: Path) -> WeightFormat | None:
    """The format of a weight file by its suffix, None for one that cannot be read."""
    return next((form for form in (*NAMELESS, GGUF) if path.suffix in form.suffixes), None)


def is_part(name: str) -> bool:
    """Whether a weight file is one of several shards, by its name."""
    found = _SHARD.search(name)
    return found is not None and int(found[2]) != 1
