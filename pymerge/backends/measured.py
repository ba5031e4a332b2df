"""Table of measured times, kept as data: the fastest backend for an op on a CUDA device.

The table, measured.json, holds nothing but what a benchmark wrote on a device. To add to it, on the machine with the
device: `make gpu`, or by hand

    python -m benchmarks ops --device cuda
    python -m benchmarks ops record

and commit measured.json and the results. Rows for the same device, op, dtype and shape are replaced, all others are
kept.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pymerge.common.dtypes import DTYPES
from pymerge.errors import BackendError

_TABLE = Path(__file__).with_name("measured.json")

# A measurement speaks for shapes up to this factor away, in the number of layers, in d_out and in d_in.
_REACH = 2.0


class Row(NamedTuple):
    """The fastest backend in one case."""

    device: str  # as torch.cuda.get_device_name gives it
    op: str
    dtypes: str  # of the arguments, "bfloat16" or "bfloat16, float32"
    shape: tuple[int, int, int]  # layers, d_out, d_in
    backend: str
    speedup: float  # the reference's median time over this backend's
    source: str  # date and commit of the benchmark


def nearest(device: str, op: str, dtypes: frozenset[str], shape: tuple[int, ...]) -> Row | None:
    """The row of this device, op and dtypes whose shape is the nearest, within a factor of 2; None if there is none."""
    names = _names(dtypes)
    found = [
        (distance, row)
        for row in rows()
        if (row.device, row.op, row.dtypes) == (device, op, names)
        and (distance := _distance(row.shape, _problem(shape))) is not None
    ]
    return min(found)[1] if found else None


def rows() -> tuple[Row, ...]:
    """The table."""
    return _read(_TABLE)


@cache
def _read(table: Path) -> tuple[Row, ...]:
    return tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(table.read_text())["rows"])


def summary() -> str:
    """Line of `pymerge env` about it: devices and numbers of rows."""
    devices = sorted({row.device for row in rows()})
    if not devices:
        return "no op has been timed on a GPU: there, auto is PyTorch"
    counts = [f"{name} ({sum(row.device == name for row in rows())} cases)" for name in devices]
    return f"auto on a GPU is the fastest in the nearest case measured: {', '.join(counts)}; elsewhere PyTorch"


def from_results(results: dict[str, Any]) -> list[Row]:
    """Rows of results of the benchmark of ops: of each case that ran on PyTorch and on a device kernel, the fastest.

    Raises BackendError if there is no such case: results of a CPU have none.
    """
    times: dict[tuple[str, str, tuple[int, int, int]], dict[str, float]] = {}
    for case in results["rows"]:
        if case["kind"] == "time" and "-" not in case["op"]:  # behind a dash, a further case of an op
            key = (case["op"], case["dtype"], (1, case["d_out"], case["d_in"]))
            times.setdefault(key, {})[case["backend"]] = case["seconds"]["median"]
    machine = results["machine"]
    source = f"{results['date'][:10]} at {machine['commit']}"
    found = []
    for (op, dtype, shape), medians in times.items():
        medians.pop("peer", None)  # not one of ours
        if "reference" in medians and {"triton", "cuda"} & medians.keys():
            best = min(medians, key=lambda backend: medians[backend])
            speedup = round(medians["reference"] / medians[best], 3)
            found.append(Row(machine["device"], op, dtype, shape, best, speedup, source))
    if not found:
        raise BackendError(f"no case ran on a device kernel of ours on {machine['device']!r}; give results from a GPU")
    return found


def record(results: Path) -> int:
    """Write the rows of a results file into the table; returns how many."""
    new = from_results(json.loads(results.read_text()))
    kept = {row[:4]: row for row in (*rows(), *new)}
    lines = ",\n".join("  " + json.dumps(row._asdict()) for row in sorted(kept.values()))
    _TABLE.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    _read.cache_clear()
    return len(new)


def _names(dtypes: frozenset[str]) -> str:
    return ", ".join(sorted(DTYPES[code].torch for code in dtypes))


def _problem(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(layers, d_out, d_in) of a layer's shape; where there are more dimensions, the last ones count as one."""
    if len(shape) > 3:
        return (1, shape[0], math.prod(shape[1:]))
    layers, rows, columns = (*(1,) * (3 - len(shape)), *shape)
    return (layers, rows, columns)


def _distance(measured: tuple[int, int, int], asked: tuple[int, int, int]) -> float | None:
    """Sum of the factors' logarithms; None beyond the reach in one dimension, or where nothing is to be computed."""
    if 0 in asked or 0 in measured:
        return None
    logs = [abs(math.log(a / b)) for a, b in zip(measured, asked, strict=True)]
    return None if max(logs) > math.log(_REACH) else sum(logs)
