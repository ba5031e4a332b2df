"""Checkpoints on disk: headers of weight files, positional reads, planned layouts, resumable writes, checks."""

from __future__ import annotations

from pymerge.checkpoint.carried import carried_files
from pymerge.checkpoint.dtypes import (
    ITEM_SIZES,
    TORCH_DTYPES,
    bytes_of,
    code_of,
    is_float,
    is_float8,
    memory_item_size,
    upcast,
)
from pymerge.checkpoint.files import MANIFEST_NAME, WORK_FOLDER, atomic_write, fsync_directory
from pymerge.checkpoint.gather import GatheredEntry, RowMap, gathered
from pymerge.checkpoint.headers import Checkpoint, Header, TensorEntry, open_checkpoint, read_header
from pymerge.checkpoint.hub import fetch
from pymerge.checkpoint.identity import differences, printable
from pymerge.checkpoint.layout import ShardLayout, TensorLayout, index_json, index_name, layout_file, layout_shards
from pymerge.checkpoint.manifest import VerifyReport, build_manifest, read_manifest, verify
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.writer import OutputDirectory

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
