"""Saves a model as trainings do: python -m tests.helpers.save_distributed RANK COUNT MODEL FOLDER tensors|fully_shard.

`tensors` distributes each by hand; `fully_shard` trains one step with FSDP2 and saves as PyTorch's tutorial does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor


def placement(name: str, tensor: torch.Tensor) -> Placement:
    """Rows for most tensors, as FSDP shards them; columns, as tensor parallelism does; or the whole."""
    if name.endswith("down_proj.weight"):
        return Shard(1)
    return Replicate() if name.endswith("norm.weight") or not tensor.shape else Shard(0)


class Weights(nn.Module):
    """A model of parameters alone, under the names that a checkpoint has for them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        inside: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                inside.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(first, nn.Parameter(tensor))
        for first, those in inside.items():
            self.add_module(first, Weights(those))

    def forward(self) -> torch.Tensor:
        """A sum that every parameter has a part in."""
        own = [each.float().sum() for each in self.parameters(recurse=False)]
        return sum([*own, *(each() for each in self.children())], torch.zeros(()))


class Application(Stateful):
    """What the tutorial on torch.distributed.checkpoint saves, under one name."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}


def trained(tensors: dict[str, torch.Tensor]) -> Application:
    """The model after a step of a learning rate of zero, each block in its own group, as FSDP2 is used."""
    model = Weights(tensors)
    for block in model.get_submodule("model.layers").children():
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model().backward()
    optimizer.step()
    return Application(model, optimizer)


def main(rank: int, count: int, model: Path, folder: Path, how: str) -> None:
    """One process of the training."""
    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    tensors = load_file(model / "model.safetensors")
    if how == "fully_shard":
        dcp.save({"app": trained(tensors)}, checkpoint_id=folder)
        dist.destroy_process_group()
        return
    state = {name: distribute_tensor(tensor, mesh, [placement(name, tensor)]) for name, tensor in tensors.items()}
    moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in state.items()}
    dcp.save({"model": state, "optimizer": {"state": moments}, "step": 7}, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
