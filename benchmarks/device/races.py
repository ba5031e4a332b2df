"""Kernels that share memory among threads, once each on small shapes, to be watched by compute-sanitizer."""

from __future__ import annotations

import torch

from benchmarks.device.rows import parse
from benchmarks.harness.results import Content
from pymerge.backends.runner import Runner
from pymerge.ops.trim_threshold import TrimThreshold
from pymerge.ops.wudi_adam import WudiAdam
from pymerge.testing.cases import task_case


def main() -> None:
    """Run them; the sanitizer tells what it has seen, and its exit code."""
    rows, _ = parse(__doc__)
    device = rows.device
    case = task_case((300, 130), [torch.bfloat16] * 3, device=device)
    selection = TrimThreshold(case.base, case.experts, [1000, 20_000])
    system = WudiAdam(torch.eye(130, device=device), torch.ones(300, 130, device=device), 3, 1e-5)
    backends = ("cuda", "triton") if device == "cuda" else ("reference", "reference")

    def select() -> Content:
        found = Runner(backends[0], device)(selection)
        return {"same": bool((found.keys == selection.reference().keys).all())}

    def descend() -> Content:
        return {"finite": bool(Runner(backends[1], device)(system).isfinite().all())}

    rows.attempt("race", select, op="trim_threshold", backend=backends[0])
    rows.attempt("race", descend, op="wudi_adam", backend=backends[1])


if __name__ == "__main__":
    main()
