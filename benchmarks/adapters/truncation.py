"""Adapters merged to one of a lower rank, on one layer: from the factors, and by PEFT's `svd` of the whole sum."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator

from benchmarks.harness import environments, processes, weights
from benchmarks.harness.targets import Row
from pymerge.testing.bench import summary

SHAPES = ("2048x2048x3", "2048x8192x3")
AGREEMENT = 1e-3  # most by which the errors of both differ, of their size


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Rows of all shapes, each from a process in PEFT's environment."""
    python = environments.environment(environments.PEFT) / "python"
    for shape in options.truncated:
        command = [str(python), "-m", "benchmarks.peers.peft_svd", shape, str(options.rank), str(options.repeat)]
        done = subprocess.run(command, env=processes.variables(), capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        d_out, d_in, tasks = weights.sizes(shape)
        about = {"part": "truncation", "d_out": d_out, "d_in": d_in, "tasks": tasks, "rank": options.rank}
        ours, theirs = (found["errors"][name] for name in ("pymerge", "peft"))
        if abs(ours - theirs) > AGREEMENT * theirs:
            yield {"kind": "disagreement", **about, "method": "truncation", "difference": abs(ours - theirs)}
            continue
        times = {name: summary(each) for name, each in found["seconds"].items()}
        for form, each in times.items():
            speedup = times["peft"]["median"] / each["median"]
            row = {"form": form, "seconds": each, "speedup_over_peft": speedup, "lost": found["errors"][form]}
            yield {"kind": "truncation", **about, **row}
