"""Merges by FusionBench's own WUDI; run in an environment that has fusion-bench (cross_check.py does).

    python fusion_peer.py BASE OUT SCALE EXPERT...

Checkpoints are folders with model.safetensors. Deltas are multiplied by SCALE before, and what comes out is divided by
it: FusionBench's step size is fixed, and suits deltas of one size only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

import torch
from fusion_bench.method.wudi.wudi import wudi_merging
from safetensors.torch import load_file, save_file

STEPS = 300


def main() -> None:
    """The command line."""
    base, out, scale = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    origin = load_file(base / "model.safetensors")
    wide = {name: tensor.float() for name, tensor in origin.items()}
    taus = []
    for folder in sys.argv[4:]:
        expert = load_file(Path(folder, "model.safetensors"))
        taus.append({name: (expert[name].float() - tensor) * scale for name, tensor in wide.items()})
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        merged = wudi_merging(taus, accelerator=torch.device("cpu"), iter_num=STEPS)
    out.mkdir(parents=True)
    shutil.copyfile(base / "config.json", out / "config.json")
    result = {
        name: (tensor + merged[name].detach() / scale).to(origin[name].dtype).contiguous()
        for name, tensor in wide.items()
    }
    save_file(result, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
