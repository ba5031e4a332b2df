"""Checkpoints on disk: headers of weight files, positional reads, planned layouts, resumable writes, checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.carried import carried_files
from pymerge.checkpoint.codes import ITEM_SIZES, is_float, is_float8, memory_item_size
from pymerge.checkpoint.files import MANIFEST_NAME, WORK_FOLDER, atomic_write, fsync_directory
from pymerge.checkpoint.gathered_entry import GatheredEntry
from pymerge.checkpoint.headers import Checkpoint, Header, TensorEntry, open_checkpoint, read_header
from pymerge.checkpoint.hub import fetch
from pymerge.checkpoint.identity import differences, printable
from pymerge.checkpoint.layout import ShardLayout, TensorLayout, index_json, index_name, layout_file, layout_shards
from pymerge.checkpoint.manifest import VerifyReport, build_manifest, read_manifest, verify
from pymerge.checkpoint.reader import Reader, failed_read
from pymerge.checkpoint.writer import OutputDirectory

if TYPE_CHECKING:
    from pymerge.checkpoint.dtypes import TORCH_DTYPES, bytes_of, code_of, upcast
    from pymerge.checkpoint.gather import gathered
    from pymerge.checkpoint.rowmap import RowMap

# Of modules that import PyTorch or numpy.
_HOMES = {
    "TORCH_DTYPES": "pymerge.checkpoint.dtypes",
    "bytes_of": "pymerge.checkpoint.dtypes",
    "code_of": "pymerge.checkpoint.dtypes",
    "upcast": "pymerge.checkpoint.dtypes",
    "gathered": "pymerge.checkpoint.gather",
    "RowMap": "pymerge.checkpoint.rowmap",
}

__all__ = [
    "ITEM_SIZES",
    "MANIFEST_NAME",
    "TORCH_DTYPES",
    "WORK_FOLDER",
    "Checkpoint",
    "GatheredEntry",
    "Header",
    "OutputDirectory",
    "Reader",
    "RowMap",
    "ShardLayout",
    "TensorEntry",
    "TensorLayout",
    "VerifyReport",
    "atomic_write",
    "build_manifest",
    "bytes_of",
    "carried_files",
    "code_of",
    "differences",
    "failed_read",
    "fetch",
    "fsync_directory",
    "gathered",
    "index_json",
    "index_name",
    "is_float",
    "is_float8",
    "layout_file",
    "layout_shards",
    "memory_item_size",
    "open_checkpoint",
    "printable",
    "read_header",
    "read_manifest",
    "upcast",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import on first use: what needs headers and bytes alone does not wait for PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pymerge.checkpoint' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
