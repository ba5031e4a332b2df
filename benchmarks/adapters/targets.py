"""Targets of merges of adapters: what they should reach at least, and whether they do."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.adapters.inputs import CORE
from benchmarks.harness.targets import Row, target
from pymerge.common.units import format_bytes

# Layers without files, whose sides are at least so long: least speed-up over whole weights; where inputs are four times
# the outputs or more, the second.
SHORTEST_SIDE = 1024
FASTER_THAN_DENSE, WIDE_FASTER_THAN_DENSE, WIDE = 50.0, 500.0, 4
# Whole merges of JUDGED: most time of solvers over task_arithmetic's, by the number of adapters; of task_arithmetic
# with many over one.
JUDGED = "1.2B"
OVER_TASK_ARITHMETIC = {3: 1.5, 8: 2.0}
MANY, MANY_OVER_ONE = 8, 1.5
# Of any size: peak memory with the most adapters over that with the fewest.
MORE_MEMORY = 1.1
FASTER_THAN_MERGEKIT, SHARE_OF_MERGEKITS_PEAK = 5.0, 0.1


def judge(rows: Sequence[Row]) -> list[Row]:
    """Each target that the rows can tell about: what it is, what was found, whether it is met."""
    found: list[Row] = []
    for row in rows:
        if row["kind"] in ("layer", "disagreement"):
            found += _of_layer(row)
        elif row["part"] == "merges" and row["form"] == "pymerge" and row["size"] == JUDGED:
            found += _of_merge(row)
        elif row["part"] == "mergekit" and row["form"] == "pymerge":
            found += _beside_mergekit(row)
    return found + _memory([row for row in rows if row["part"] == "merges" and row["form"] == "pymerge"])


def _of_layer(row: Row) -> list[Row]:
    name = f"{row['method']}, {row['d_out']} x {row['d_in']}, {row['tasks']} tasks"
    if row["kind"] == "disagreement":
        return [target(f"{name}: the same X as on whole weights", f"differs by {row['difference']:.1e}", False)]
    if row["form"] == "dense" or min(row["d_out"], row["d_in"]) < SHORTEST_SIDE:
        return []
    least = WIDE_FASTER_THAN_DENSE if row["d_in"] >= WIDE * row["d_out"] else FASTER_THAN_DENSE
    speedup = row["speedup_over_dense"]
    what = f"{name}, {row['form']}: at least {least:g}x faster than on whole weights"
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
    name, speedup, share = f"{row['method']} of {row['adapters']}, {row['size']}", *_ratios(row)
    return [
        target(
            f"{name}: at least {FASTER_THAN_MERGEKIT:g}x faster than mergekit",
            f"{speedup:.1f}x",
            speedup >= FASTER_THAN_MERGEKIT,
        ),
        target(
            f"{name}: at most {SHARE_OF_MERGEKITS_PEAK:.0%} of mergekit's peak memory",
            f"{share:.1%}",
            share <= SHARE_OF_MERGEKITS_PEAK,
        ),
    ]


def _ratios(row: Row) -> tuple[float, float]:
    return row["speedup_over_mergekit"], row["share_of_mergekits_peak"]


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
