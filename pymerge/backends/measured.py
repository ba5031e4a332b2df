"""Table of measured times, kept as data: the fastest backend for an op on a CUDA device.

The table, measured.json, holds nothing but what a benchmark wrote on a device: `make gpu` there, then, with what it has
brought home,

    python -m benchmarks device take FOLDER

Commit measured.json and the results. Rows for the same device, op, dtype and shape are replaced, all others are kept.
Beside the ops are whole merges that were timed on a device and on the same machine's CPU: where the device was faster,
`--device auto` takes it for that method, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
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


class Merge(NamedTuple):
    """Whole merges by one method, on a device and on a CPU beside it."""

    device: str
    method: str
    speedup: float  # the CPU's seconds over the device's
    source: str


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
    """The table of ops."""
    return _read(_TABLE)[0]


def merges() -> tuple[Merge, ...]:
    """The table of whole merges."""
    return _read(_TABLE)[1]


def gains(device: str, method: str) -> bool:
    """Whether merges by a method were faster on this device than on the CPU beside it."""
    return any((row.device, row.method) == (device, method) and row.speedup > 1.0 for row in merges())


@cache
def _read(table: Path) -> tuple[tuple[Row, ...], tuple[Merge, ...]]:
    found = json.loads(table.read_text())
    ops = tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in found["rows"])
    return ops, tuple(Merge(**row) for row in found.get("merges", ()))


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
    _write({row[:4]: row for row in (*rows(), *new)}.values(), merges())
    return len(new)


def record_merges(results: Path) -> int:
    """Write the merges of a run on a device that were timed on its CPU, too, into the table; returns how many."""
    content = json.loads(results.read_text())
    device, source = content["machine"]["device"], f"{content['date'][:10]} at {content['machine']['commit']}"
    seconds = {
        (row["method"], row["device"]): row["seconds"]
        for row in content["rows"]
        if row["kind"] == "merge" and "seconds" in row
    }
    new = [
        Merge(device, method, round(seconds[method, "cpu"] / one, 3), source)
        for (method, where), one in seconds.items()
        if where != "cpu" and (method, "cpu") in seconds
    ]
    _write(rows(), {row[:2]: row for row in (*merges(), *new)}.values())
    return len(new)


def _write(ops: Iterable[Row], whole: Iterable[Merge]) -> None:
    tables = {"rows": [row._asdict() for row in sorted(ops)], "merges": [row._asdict() for row in sorted(whole)]}
    parts = [
        f'"{name}": [\n' + ",\n".join("  " + json.dumps(row) for row in table) + "\n]" for name, table in tables.items()
    ]
    _TABLE.write_text("{" + ",\n".join(parts) + "}\n")
    _read.cache_clear()


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
