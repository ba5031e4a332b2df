"""wemoe-router.safetensors: the small file that adaptation writes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pymerge.checkpoint.checkpoint import read_header
from pymerge.common.dtypes import code_of
from pymerge.common.files import fsync_directory
from pymerge.errors import CheckpointError
from pymerge.output.layout import Described
from pymerge.wemoe.router import make_router, router_count
from pymerge.wemoe.spec import Spec

ROUTER_NAME = "wemoe-router.safetensors"
SHARED = "shared"


def router_tensors(spec: Spec, routers: nn.ModuleList) -> dict[str, Tensor]:
    """Parameters of all routers by their stored names: PATH::PARAMETER, or shared::PARAMETER."""
    return {
        name: tensor
        for index, router in enumerate(routers)
        for name, tensor in one_routers_tensors(spec, index, router).items()
    }


def one_routers_tensors(spec: Spec, index: int, router: nn.Module) -> dict[str, Tensor]:
    """Parameters of router number `index` by their stored names."""
    owner = SHARED if spec.router.shared else spec.modules[index].path
    return {f"{owner}::{name}": tensor.detach() for name, tensor in router.state_dict().items()}


def described_routers(spec: Spec) -> list[list[Described]]:
    """Stored names, dtypes and shapes of each router's parameters."""
    found = []
    for index in range(router_count(spec)):
        with torch.device("meta"):
            router = make_router(spec, index, None)
        tensors = one_routers_tensors(spec, index, router).items()
        found.append([(name, code_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors])
    return found


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)
    fsync_directory(path.parent)


def write_routers(path: Path | str, spec: Spec, routers: nn.ModuleList) -> None:
    """Write the routers to a file, or into a directory under their usual name."""
    path = Path(path)
    target = path / ROUTER_NAME if path.is_dir() else path
    # One key: safetensors writes several in an order that changes from process to process.
    write_tensors(target, router_tensors(spec, routers), {"format": "pt"})


def read_routers(path: Path | str, spec: Spec, routers: nn.ModuleList) -> None:
    """Load a file of `write_routers` (or a directory that holds one) into `routers`, strictly.

    Raises CheckpointError if names, shapes or dtypes are not exactly those of `spec`.
    """
    path = Path(path)
    source = path / ROUTER_NAME if path.is_dir() else path
    expected = router_tensors(spec, routers)
    entries = read_header(source).entries
    odd = sorted(set(entries) ^ set(expected))
    if odd:
        kind = "is missing" if odd[0] in expected else "belongs to no router of wemoe.json"
        raise CheckpointError(f"{source}: tensor {odd[0]!r} {kind}; give the router of this model")
    with safe_open(source, "pt") as file:
        for name, target in expected.items():
            tensor = file.get_tensor(name)
            if tensor.shape != target.shape or not tensor.is_floating_point():
                raise CheckpointError(
                    f"{source}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, wemoe.json says "
                    f"{list(target.shape)}; give the router of this model"
                )
            target.copy_(tensor)
