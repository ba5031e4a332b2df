"""routed_linear beside FusionBench's form, which merges a weight for each sample, and the plain layer of the base."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.device.rows import normal, parse
from benchmarks.harness.results import Content
from pymerge.backends.runner import Runner
from pymerge.ops.routed.task_storage import DenseTasks
from pymerge.ops.routed_linear import RoutedLinear

SAMPLES, TOKENS, TASKS = 8, 512, 4


def main() -> None:
    """Measure the up-projections of ViT-B and of Llama-3-8B."""
    rows, _ = parse(__doc__)
    shapes = (("tiny", 48, 32),) if rows.tiny else (("vit-b", 3072, 768), ("llama8b", 14336, 4096))
    for name, d_out, d_in in shapes:
        x = normal((SAMPLES, 4 if rows.tiny else TOKENS, d_in), rows.device, 0, torch.bfloat16)
        weight = (0.02 * normal((d_out, d_in), rows.device, 1)).bfloat16()
        tasks = (1e-3 * normal((TASKS, d_out, d_in), rows.device, 2)).bfloat16()
        gates = normal((SAMPLES, TASKS), rows.device, 3).softmax(1)

        def published(x: Tensor = x, weight: Tensor = weight, tasks: Tensor = tasks, gates: Tensor = gates) -> Tensor:
            made = [weight + torch.tensordot(gate.to(tasks.dtype), tasks, 1) for gate in gates]
            return torch.stack([linear(sample, own) for sample, own in zip(x, made, strict=True)])

        def plain(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return linear(x, weight)

        op = RoutedLinear(x, gates, weight, DenseTasks(tasks))
        about = {"layer": name, "d_out": d_out, "d_in": d_in, "samples": SAMPLES, "tasks": TASKS}
        for backend in ("reference", "triton") if rows.device == "cuda" else ("reference",):
            run = Runner(backend, rows.device)

            def ours(run: Runner = run, op: RoutedLinear = op) -> Content:
                seconds = {"seconds": rows.clock(lambda: run(op))}
                expected = published().float()
                return {**seconds, "difference": float((run(op).float() - expected).norm() / expected.norm())}

            rows.attempt("routed", ours, form="ours", backend=backend, **about)
        rows.add("routed", form="FusionBench's", seconds=rows.clock(published), **about)
        rows.add("routed", form="the plain layer", seconds=rows.clock(plain), **about)


if __name__ == "__main__":
    main()
