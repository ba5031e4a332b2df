"""FusionBench's WUDI, from PyPI, on the same checkpoints: accuracies equal ours to within a test image in a thousand.

Twice: with the deltas as they are, where its fixed step of 1e-5 is far too short for them, and with all deltas scaled
to the size that the step suits, where the merge is a good one. Ours takes the step over that scale instead.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import pymerge
from benchmarks.harness import environments, processes
from benchmarks.quality.cases import Recipe
from benchmarks.quality.store import Entry, Store
from benchmarks.quality.suite import Part, Suite, mean, scores
from benchmarks.quality.table import Tell

LR = 1e-5  # of FusionBench, fixed
PUBLISHED_RMS = 5e-4  # of the deltas that it suits
PEER = Path(__file__).with_name("fusion_peer.py")


def cross_check(suite: Suite, store: Store, part: Part, tell: Tell) -> Iterator[Entry]:
    """Rows of the first seed: theirs, ours, and how far the merged weights and the accuracies are apart."""
    seed = suite.seeds[0]
    factor = 2.0 ** round(math.log2(PUBLISHED_RMS / _rms(suite, seed)))  # a power of two: scaling rounds nothing
    for scale in (1.0, factor):
        recipe = Recipe("wudi", "wudi", {"lr": LR / scale, "iterations": 300})
        key = {"suite": suite.name, "fingerprint": suite.fingerprint(seed), "seed": seed, "part": part}
        key |= {"of": "cross-check", "scale": scale, "recipe": asdict(recipe), "peer": environments.FUSION_BENCH[0]}
        entry = store.get(f"cross-check-{scale:g}", key, partial(_compare, suite, recipe, scale, seed, part))
        worst = max(abs(entry["scores"][task] - entry["theirs"][task]) for task in suite.tasks)
        found = {"mean": mean(entry["scores"].values()), "their_mean": mean(entry["theirs"].values()), "worst": worst}
        told = "cross-check, deltas x {:g}: ours {:.2f}, theirs {:.2f}, largest difference of a task {:.2f}"
        tell(told.format(scale, found["mean"], found["their_mean"], worst))
        yield {"kind": "cross-check", "suite": suite.name, "seed": seed, "part": part, **entry, **found}


def _rms(suite: Suite, seed: int) -> float:
    """Root mean square of all deltas of linear weights."""
    plan = pymerge.plan(Recipe("wudi", "wudi").config(suite, suite.tasks, seed))
    names = [step.name for step in plan.steps if step.role.solvable]
    base = suite.load(suite.base()).state_dict()
    squares, count = 0.0, 0
    for task in suite.tasks:
        expert = suite.load(suite.expert(task, seed)).state_dict()
        for name in names:
            squares += float((expert[name] - base[name]).double().square().sum())
            count += base[name].numel()
    return math.sqrt(squares / count)


def _compare(suite: Suite, recipe: Recipe, scale: float, seed: int, part: Part) -> Entry:
    python = environments.environment(environments.FUSION_BENCH, checkout=True) / "python"
    with tempfile.TemporaryDirectory(prefix="pymerge-quality-") as folder:
        theirs, ours = Path(folder, "theirs"), Path(folder, "ours")
        experts = [suite.expert(task, seed) for task in suite.tasks]
        cost = processes.run([python, PEER, suite.base(), theirs, str(scale), *experts])
        pymerge.merge(recipe.config(suite, suite.tasks, seed), ours, progress=False)
        models = {name: suite.load(path) for name, path in (("base", suite.base()), ("theirs", theirs), ("ours", ours))}
        found = {name: scores(suite, models[name], suite.tasks, seed, part) for name in ("theirs", "ours")}
    weights = {name: torch.nn.utils.parameters_to_vector(model.parameters()).detach() for name, model in models.items()}
    distance = float((weights["ours"] - weights["theirs"]).norm() / (weights["theirs"] - weights["base"]).norm())
    return {
        "peer": environments.FUSION_BENCH[0],
        "scale": scale,
        "parameters": dict(recipe.parameters),
        "scores": found["ours"],
        "theirs": found["theirs"],
        "their_seconds": cost.wall,
        "relative_distance": distance,  # of the merged models, over that of theirs from the base
        "unequal_weights": float((weights["ours"] != weights["theirs"]).double().mean()),
    }
