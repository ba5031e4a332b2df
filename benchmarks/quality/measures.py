"""What the experts look like before they are merged: cosines, singular values, heterogeneity, sizes (one seed).

The measures are those of `pymerge report`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pymerge
from benchmarks.quality.cases import FLOW
from benchmarks.quality.store import Entry, Store
from benchmarks.quality.suite import Part, Suite
from benchmarks.quality.table import Tell
from pymerge.analysis import TensorMeasures, survey
from pymerge.analysis.measures import cosines

SPECTRUM_POINTS = 64  # of a curve of singular values


def measures(suite: Suite, store: Store, part: Part, tell: Tell) -> Iterator[Entry]:
    """Rows for each group of tensors (cosines), linear weight (heterogeneity, sizes) and chosen weight (spectra)."""
    seed = suite.seeds[0]
    key = {"suite": suite.name, "fingerprint": suite.fingerprint(seed), "seed": seed, "of": "measures"}
    entry = store.get("measures", key, lambda: {"rows": list(_rows(suite, seed))})
    tell(f"measures of the experts of seed {seed}: {len(entry['rows'])} rows")
    for row in entry["rows"]:
        yield {**row, "suite": suite.name, "seed": seed}


def _rows(suite: Suite, seed: int) -> Iterator[dict[str, Any]]:
    found = survey(pymerge.plan(FLOW.config(suite, suite.tasks, seed)))
    changed = [tensor for tensor in found.tensors if any(tensor.norms)]
    yield {"kind": "cosines", "group": "all tensors", "cosines": _cosines(changed)}
    groups: dict[str, list[TensorMeasures]] = {}
    for tensor in changed:
        numbered = re.match(r"(.*?\.\d+)\.", tensor.name)
        groups.setdefault(numbered[1] if numbered else "all others", []).append(tensor)
    for group in sorted(groups, key=natural):
        yield {"kind": "cosines", "group": group, "cosines": _cosines(groups[group])}
    yield from _sizes(changed)
    for spectrum in found.spectra:
        # An expert may have left the tensor as it was.
        curves = [[value / values[0] for value in values] for values in spectrum.values if values[0] > 0.0]
        if not curves:
            continue
        means = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        places = sorted({round(i * (len(means) - 1) / (SPECTRUM_POINTS - 1)) for i in range(SPECTRUM_POINTS)})
        yield {
            "kind": "spectrum",
            "tensor": spectrum.name,
            "shape": spectrum.shape,
            "index": [place + 1 for place in places],
            "values": [round(means[place], 6) for place in places],
            "ranks": spectrum.ranks,
        }


def natural(group: str) -> list[tuple[int, str]]:
    """Sorts by words, and numbers by their size."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", group)]


def _cosines(tensors: Iterable[TensorMeasures]) -> list[list[float]]:
    """[T][T] of the task vectors over all these tensors together."""
    listed = [tensor.dots for tensor in tensors]
    tasks = range(len(listed[0]))
    dots = tuple(tuple(math.fsum(one[row][column] for one in listed) for column in tasks) for row in tasks)
    return [[round(value, 6) for value in row] for row in cosines(dots)]


def _sizes(tensors: Iterable[TensorMeasures]) -> Iterator[dict[str, Any]]:
    for tensor in tensors:
        rms = [math.sqrt(norm / tensor.elements) for norm in tensor.norms]
        yield {
            "kind": "tensor",
            "tensor": tensor.name,
            "layer": tensor.kind,
            "shape": tensor.shape,
            "gamma": tensor.gamma,
            "norms": tensor.norms,
            "rms": rms,
            "mean_cosine": tensor.mean_cosine,
        }
