"""Output directories for tests of the checkpoint layer: planned, written, published, read back as bytes."""

from __future__ import annotations

from pathlib import Path

import torch

from pymerge.common.dtypes import code_of
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import ShardLayout, layout_shards
from pymerge.output.manifest import build_manifest

Tensors = dict[str, torch.Tensor]

SMALL: Tensors = {name: torch.full((10,), float(i)) for i, name in enumerate("abcd")}


def plan(tensors: Tensors, limit: int) -> tuple[ShardLayout, ...]:
    return layout_shards([(n, code_of(t.dtype), tuple(t.shape)) for n, t in tensors.items()], limit)


def write_shard(output: OutputDirectory, layout: ShardLayout, tensors: Tensors) -> None:
    for tensor in layout.tensors:
        output.write(tensor.name, tensors[tensor.name])


def finish(output: OutputDirectory, tensors: Tensors, files: dict[str, bytes | Path] | None = None) -> None:
    """Write what is unfinished and publish."""
    files = {"config.json": b"{}\n"} if files is None else files
    for layout in output.layouts:
        if layout.file not in output.finished:
            write_shard(output, layout, tensors)
    manifest = build_manifest(
        output.layouts,
        output.checksums,
        files,
        identity=output.identity,
        recipe={},
        base_parameters=sum(tensor.numel() for tensor in tensors.values()),
    )
    output.publish(files, manifest)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
