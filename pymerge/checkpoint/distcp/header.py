"""A checkpoint of torch.distributed.checkpoint, as a header: PyTorch's planner says which chunk fills which part of a
tensor, and reads go to the bytes of the chunks in their files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pymerge.checkpoint.distcp.metadata import Chunk, Metadata, Place, SavedTensor, read_metadata
from pymerge.checkpoint.safetensors_file import AGAIN, Header, TensorEntry, about_dtype
from pymerge.checkpoint.sharded import Shard, ShardedEntry
from pymerge.checkpoint.torch_file import entry_of, in_order, read_archive
from pymerge.checkpoint.torch_pickle import View
from pymerge.common.dtypes import ITEM_SIZES, code_of
from pymerge.common.files import opened
from pymerge.common.names import first_few, shorten
from pymerge.errors import ArgumentError, CheckpointError

_MODEL = "model"
_MOST_CELLS = 1 << 24

# What of each chunk is read for a tensor: the place of its first element, and where its bytes are.
Reads = list[tuple[Chunk, Place]]


def read_distcp(path: Path) -> Header:
    """Read what the checkpoint with this .metadata holds of a model; no tensor is read, no pickled code is run.

    The model's tensors are those under "model", or, if there are none, those at the top. What else is in it is left
    out, and said in `notes`. Raises CheckpointError.
    """
    metadata = read_metadata(path)
    names, notes = _model_names(path, metadata)
    reads = _plan(path, metadata, names)
    places: dict[str, list[tuple[str, Chunk, Place]]] = {}
    for key, each in reads.items():
        for chunk, place in each:
            places.setdefault(place.file, []).append((key, chunk, place))
    shards: dict[str, list[Shard]] = {key: [] for key in names}
    stamps = {}
    for file, inside in sorted(places.items()):
        with opened(path.parent / file, "PyTorch") as (descriptor, status):
            stamps[path.parent / file] = (status.st_size, status.st_mtime_ns)
            for key, chunk, place in sorted(inside, key=lambda each: each[2].offset):
                if place.offset + place.nbytes > status.st_size:
                    raise CheckpointError(
                        f"{path.parent / file}: is cut short ({status.st_size} bytes): tensor {shorten(names[key])} "
                        f"reaches to byte {place.offset + place.nbytes}; {AGAIN}"
                    )
                entry = _stored(path.parent / file, descriptor, names[key], metadata.tensors[key], chunk, place)
                shards[key].append(Shard(chunk.offsets, entry))
    entries = in_order(_entry(path, name, metadata.tensors[key], shards[key]) for key, name in names.items())
    size, time = metadata.stamp
    return Header(entries, {}, size, size, time, notes, others=stamps)


def _model_names(path: Path, metadata: Metadata) -> tuple[dict[str, str], tuple[str, ...]]:
    """The model's names of its tensors by their keys, and what else is there."""
    tensors = {key: metadata.paths[key] for key in metadata.tensors}
    models = {inside[:depth] for inside in tensors.values() for depth in (1, 2) if _is_model(inside, depth)}
    place = (_MODEL,) if (_MODEL,) in models else min(models, default=())
    under = ".".join(place)
    if len(models) > 1 and len(place) > 1:
        raise CheckpointError(
            f"{path}: has more than one model, {first_few(sorted(map('.'.join, models)))}; "
            f"save {{{_MODEL!r}: model.state_dict()}} of the one"
        )
    depth = len(place)
    inner = {key: ".".join(inside[depth:]) for key, inside in tensors.items() if depth and inside[:depth] == place}
    names = inner or {key: inside[0] for key, inside in tensors.items() if len(inside) == 1}
    if not names:
        tops = sorted({inside[0] for inside in metadata.paths.values()})
        raise CheckpointError(
            f"{path}: has tensors neither at its top nor under {_MODEL!r}, only {first_few(tops)}; "
            f"save {{{_MODEL!r}: model.state_dict()}} with it"
        )
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{path}: has two tensors of one name under {under!r}; {AGAIN}")
    others: dict[str, int] = {}
    for key, inside in metadata.paths.items():
        if key not in names:
            other = ".".join(inside[: max(1, depth)])
            others[other] = others.get(other, 0) + 1
    left = ", ".join(f"{name} ({count} entries)" if count > 1 else name for name, count in others.items())
    which = f"the weights are those under {under!r}; " if inner else ""
    return names, (f"{path.parent}: {which}left out: {left}",) if others else ()


def _is_model(inside: tuple[str, ...], depth: int) -> bool:
    """Whether a path leads into "model", at the top or in one that was saved with others, as "app" of PyTorch's
    tutorial: so deep."""
    return len(inside) > depth and inside[depth - 1] == _MODEL


def _plan(path: Path, metadata: Metadata, names: Mapping[str, str]) -> dict[str, Reads]:
    """Reads of each tensor, by PyTorch's own planner for a process that wants all of it."""
    try:
        from torch.distributed.checkpoint import metadata as theirs
        from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
    except ImportError as error:
        raise CheckpointError(
            f"{path}: is read with torch.distributed.checkpoint, which this PyTorch was built without; "
            "save the model as safetensors where it was trained"
        ) from error
    saved = {
        key: theirs.TensorStorageMetadata(
            theirs.TensorProperties(tensor.dtype),
            torch.Size(tensor.shape),
            [theirs.ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in tensor.chunks],
        )
        for key in names
        for tensor in (metadata.tensors[key],)
    }
    wanted = {
        key: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta") for key, tensor in saved.items()
    }
    reads: dict[str, Reads] = {key: [] for key in names}
    for item in create_default_local_load_plan(wanted, theirs.Metadata(dict(saved))).items:
        key, offset = item.storage_index.fqn, tuple(item.storage_index.offset or ())
        place = metadata.places.get((key, offset)) or metadata.places.get((key, ()))
        if place is None:
            raise CheckpointError(
                f"{path}: tensor {shorten(names[key])}: no file has its chunk at {list(offset)}; {AGAIN}"
            )
        reads[key].append((Chunk(tuple(item.dest_offsets), tuple(item.lengths)), place))
    for key, chunks in reads.items():
        _check_whole(f"{path}: tensor {shorten(names[key])}", metadata.tensors[key], [each for each, _ in chunks])
    return reads


def _check_whole(where: str, tensor: SavedTensor, chunks: Sequence[Chunk]) -> None:
    """Raise CheckpointError unless each element of a tensor is in exactly one of the chunks."""
    problem = ""
    numel = math.prod(tensor.shape)
    held = sum(math.prod(chunk.sizes) for chunk in chunks)
    if held < numel:
        problem = f"{numel - held} of its {numel} elements are in no chunk"
    elif held > numel or (len(chunks) > 1 and not _side_by_side(where, chunks)):
        problem = "its chunks overlap"
    if problem:
        raise CheckpointError(f"{where}: {problem}; {AGAIN}, all files of one save")


def _side_by_side(where: str, chunks: Sequence[Chunk]) -> bool:
    """Whether no two of the chunks share an element: counted on the grid of all their edges."""
    edges = []
    for axis in range(len(chunks[0].sizes)):
        bounds = {bound for offsets, sizes in chunks for bound in (offsets[axis], offsets[axis] + sizes[axis])}
        edges.append({bound: number for number, bound in enumerate(sorted(bounds))})
    shape = [len(each) - 1 for each in edges]
    if math.prod(shape) > _MOST_CELLS:
        raise CheckpointError(f"{where}: {len(chunks)} chunks do not lie in rows and columns; save it again unsharded")
    cells = np.zeros(shape, dtype=bool)
    for offsets, sizes in chunks:
        sides = zip(edges, offsets, sizes, strict=True)
        box = tuple(slice(edge[first], edge[first + size]) for edge, first, size in sides)
        if cells[box].any():
            return False
        cells[box] = True
    return True


def _stored(file: Path, descriptor: int, name: str, tensor: SavedTensor, chunk: Chunk, place: Place) -> TensorEntry:
    """The entry of a chunk in its file, checked against what .metadata says of it."""
    where = f"{file}: tensor {shorten(name)}"
    view = (archive := read_archive(file, descriptor, place.offset, place.nbytes)).found
    if not isinstance(view, View):
        raise CheckpointError(f"{where}: there is no tensor at byte {place.offset}; {AGAIN}")
    entry = entry_of(file, name, view, archive.places)
    if entry.shape != chunk.sizes or view.dtype != tensor.dtype:
        raise CheckpointError(
            f"{where}: is {view.dtype} {list(entry.shape)} there, and {tensor.dtype} {list(chunk.sizes)} by .metadata; "
            f"{AGAIN}, all files of one save"
        )
    return entry


def _entry(path: Path, name: str, tensor: SavedTensor, shards: Sequence[Shard]) -> TensorEntry:
    if len(shards) == 1 and shards[0].entry.shape == tensor.shape:
        return shards[0].entry
    where = f"{path}: tensor {shorten(name)}"
    try:
        dtype = code_of(tensor.dtype)
        name.encode()
    except (ArgumentError, UnicodeEncodeError) as error:
        complex_ = tensor.dtype.is_complex
        raise CheckpointError(
            f"{where}: {about_dtype(f'C{8 * tensor.dtype.itemsize}') if complex_ else error}"
        ) from error
    nbytes = math.prod(tensor.shape) * ITEM_SIZES[dtype]
    if not shards:  # it has no elements
        return TensorEntry(name, dtype, tensor.shape, path, 0, 0)
    ordered = tuple(sorted(shards, key=lambda shard: shard.start))
    first = ordered[0].entry
    return ShardedEntry(name, dtype, tensor.shape, first.file, first.offset, nbytes, shards=ordered)
