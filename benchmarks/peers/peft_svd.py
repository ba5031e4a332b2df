"""PEFT's `add_weighted_adapter` to a lower rank by its SVD, and pymerge's truncation of the same factors, in turns.

    python -m benchmarks.peers.peft_svd OUTxINxT RANK REPEAT

runs in an environment with peft and prints seconds of each form, and the relative errors of both results, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters.inputs import factors
from benchmarks.harness.synthetic import SIZES_OF_DELTAS
from benchmarks.harness.weights import sizes
from pymerge.ops._truncate import truncate

NAME = "layer"


def model_of(pairs: list[tuple[Tensor, Tensor]], d_out: int, d_in: int, rank: int) -> Any:
    """A PEFT model of one layer, which is 0, with adapters of these factors."""
    from peft import LoraConfig, get_peft_model

    module = nn.Sequential()
    module.add_module(NAME, nn.Linear(d_in, d_out, bias=False))
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=[NAME])
    model: Any = get_peft_model(module, settings, "0")
    layer = getattr(model.base_model.model, NAME)
    for number, (B, A) in enumerate(pairs):
        if number:
            model.add_adapter(str(number), settings)
        with torch.no_grad():
            layer.lora_A[str(number)].weight.copy_(A)
            layer.lora_B[str(number)].weight.copy_(B)
    return model


def compare(shape: str, rank: int, repeat: int) -> dict[str, Any]:
    """Seconds of both, and what share of the sum of the task vectors each result is away from it."""
    d_out, d_in, tasks = sizes(shape)
    deltas = [SIZES_OF_DELTAS[task % len(SIZES_OF_DELTAS)] for task in range(tasks)]
    pairs = [factors(d_out, d_in, rank, size, shape, task) for task, size in enumerate(deltas)]
    model = model_of(pairs, d_out, d_in, rank)
    layer = getattr(model.base_model.model, NAME)
    names = [str(number) for number in range(tasks)]

    def theirs() -> tuple[Tensor, Tensor]:
        if "merged" in layer.lora_A:
            model.delete_adapter("merged")
        model.add_weighted_adapter(names, [1.0] * tasks, "merged", combination_type="svd", svd_rank=rank)
        return layer.lora_B["merged"].weight.detach(), layer.lora_A["merged"].weight.detach()

    def ours() -> tuple[Tensor, Tensor]:
        joined = torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs])
        found = truncate(*joined, rank)
        return found.B.float(), found.A.float()

    exact = torch.stack([B.double() @ A.double() for B, A in pairs]).sum(dim=0)
    forms: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"pymerge": ours, "peft": theirs}
    errors: dict[str, float] = {}
    for name, form in forms.items():  # to check, and to warm up
        B, A = form()
        errors[name] = float((B.double() @ A.double() - exact).norm() / exact.norm())
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeat):
        for name, form in forms.items():
            began = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - began)
    return {"seconds": seconds, "errors": errors}


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
