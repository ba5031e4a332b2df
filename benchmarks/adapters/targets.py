"""Targets of merges of adapters: what they should reach at least, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.adapters.inputs import CORE
from benchmarks.harness.targets import Row, target
from pymerge.common.units import format_bytes

# Nothing is judged of layers with a shorter side, and of the size that is there for tests.
SHORTEST_SIDE, TINY = 1024, "tiny"
# Layers without files: least speed-up over whole weights; where inputs are four times the outputs or more, the second.
FASTER_THAN_DENSE, WIDE_FASTER_THAN_DENSE, WIDE = 50.0, 500.0, 4
# One layer more, with files, by the method.
ADDED_FASTER = {"wudi_flow": 100.0, "ace": 50.0}
# Whole merges of JUDGED: most time of solvers over task_arithmetic's, by the number of adapters; of task_arithmetic
# with many over one.
JUDGED = "1.2B"
OVER_TASK_ARITHMETIC = {3: 1.5, 8: 2.0}
MANY, MANY_OVER_ONE = 8, 1.5
# Of any size: peak memory with the most adapters over that with the fewest.
MORE_MEMORY = 1.1
FASTER_THAN_MERGEKIT, SHARE_OF_MERGEKITS_PEAK = 5.0, 0.1
# Adapters truncated and extracted, least speed-up over other tools.
TRUNCATES_FASTER, EXTRACTS_FASTER = 100.0, 10.0

# What results of each part should be the same as.
AGREES = {"layers": "on whole weights", "files": "of whole models", "truncation": "PEFT's", "extraction": "mergekit's"}


def judge(rows: Sequence[Row]) -> list[Row]:
    """Each target that the rows can tell about: what it is, what was found, whether it is met."""
    found: list[Row] = []
    for row in rows:
        small = row.get("size") == TINY or min(row.get("d_out", math.inf), row.get("d_in", math.inf)) < SHORTEST_SIDE
        if row["kind"] == "disagreement":
            found.append(target(f"{_name(row)}: the same as {AGREES[row['part']]}", f"{row['difference']:.1e}", False))
        elif small:
            continue
        elif row["kind"] == "layer":
            found += _of_layer(row)
        elif row["kind"] == "added layer" and row["form"] == "core":
            found += _faster(f"{_name(row)}, a layer more", "whole weights", ADDED_FASTER[row["method"]], row)
        elif row["kind"] == "truncation" and row["form"] == "pymerge":
            found += _faster(_name(row), "PEFT", TRUNCATES_FASTER, row)
        elif row["kind"] == "extraction" and row["form"] == "pymerge":
            found += _faster(_name(row), "mergekit", EXTRACTS_FASTER, row)
        elif row["part"] == "merges" and row["form"] == "pymerge" and row["size"] == JUDGED:
            found += _of_merge(row)
        elif row["part"] == "mergekit" and row["form"] == "pymerge":
            found += _beside_mergekit(row)
    return found + _memory([row for row in rows if row["part"] == "merges" and row["form"] == "pymerge"])


def _name(row: Row) -> str:
    size = row["size"] if "size" in row else f"{row['d_out']} x {row['d_in']}, {row['tasks']} tasks"
    return f"{row.get('method', row['kind'])}, {size}"


def _of_layer(row: Row) -> list[Row]:
    if row["form"] == "dense":
        return []
    least = WIDE_FASTER_THAN_DENSE if row["d_in"] >= WIDE * row["d_out"] else FASTER_THAN_DENSE
    speedup = row["speedup_over_dense"]
    what = f"{_name(row)}, {row['form']}: at least {least:g}x faster than on whole weights"
    return [target(what, f"{speedup:.0f}x", speedup >= least)]


def _of_merge(row: Row) -> list[Row]:
    name = f"{row['method']} of {row['adapters']}, {row['size']}"
    over, most = row["over_task_arithmetic"], OVER_TASK_ARITHMETIC.get(row["adapters"])
    if row["method"] in CORE and most is not None and over is not None:
        what = f"{name}: at most {most:g}x the time of task_arithmetic on the same adapters"
        return [target(what, f"{over:.2f}x", over <= most)]
    over = row["over_one_adapter"]
    if row["method"] not in CORE and row["adapters"] == MANY and over is not None:
        return [target(f"{name}: at most {MANY_OVER_ONE:g}x the time of one", f"{over:.2f}x", over <= MANY_OVER_ONE)]
    return []


def _beside_mergekit(row: Row) -> list[Row]:
    name, share = f"{row['method']} of {row['adapters']}, {row['size']}", row["share_of_mergekits_peak"]
    what = f"{name}: at most {SHARE_OF_MERGEKITS_PEAK:.0%} of mergekit's peak memory"
    return [
        *_faster(name, "mergekit", FASTER_THAN_MERGEKIT, row),
        target(what, f"{share:.1%}", share <= SHARE_OF_MERGEKITS_PEAK),
    ]


def _faster(name: str, than: str, least: float, row: Row) -> list[Row]:
    """At least so many times faster than what the row was timed beside."""
    (speedup,) = (row[key] for key in row if key.startswith("speedup_over_"))
    if speedup is None:  # lost in the scatter of start-ups
        return [target(f"{name}: at least {least:g}x faster than {than}", "not to be told", False)]
    return [target(f"{name}: at least {least:g}x faster than {than}", f"{speedup:.1f}x", speedup >= least)]


def _memory(merges: Sequence[Row]) -> list[Row]:
    """Memory does not depend on the number of adapters."""
    found = []
    for size, method in dict.fromkeys((row["size"], row["method"]) for row in merges):
        same = [row for row in merges if (row["size"], row["method"]) == (size, method)]
        few, many = (pick(same, key=lambda row: int(row["adapters"])) for pick in (min, max))
        if few is not many:
            what = (
                f"{method}, {size}: peak memory with {many['adapters']} adapters at most {MORE_MEMORY:g}x that with "
                f"{few['adapters']}"
            )
            sizes = f"{format_bytes(few['peak'])}, then {format_bytes(many['peak'])}"
            found.append(target(what, sizes, many["peak"] <= MORE_MEMORY * few["peak"]))
    return found
