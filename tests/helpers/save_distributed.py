"""Saves a model as a training with FSDP does: python -m tests.helpers.save_distributed RANK COUNT MODEL FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor


def placement(name: str, tensor: torch.Tensor) -> Placement:
    """Rows for most tensors, as FSDP shards them; columns, as tensor parallelism does; or the whole."""
    if name.endswith("down_proj.weight"):
        return Shard(1)
    return Replicate() if name.endswith("norm.weight") or not tensor.shape else Shard(0)


def main(rank: int, count: int, model: Path, folder: Path) -> None:
    """One process of the training."""
    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    tensors = load_file(model / "model.safetensors")
    state = {name: distribute_tensor(tensor, mesh, [placement(name, tensor)]) for name, tensor in tensors.items()}
    moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in state.items()}
    dcp.save({"model": state, "optimizer": {"state": moments}, "step": 7}, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
