"""Targets of whole merges: what they should reach at least, and whether they do."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.targets import Row, target
from pymerge.common.units import format_bytes

ELEMENTWISE = ("linear", "task_arithmetic")
HELP_SECONDS = 0.4
OVER_FLOOR = {"1.2B": 1.6}
FASTER_THAN_MERGEKIT = {"135M": 5.0, "1.2B": 4.0}
WHOLE_FASTER_THAN_MERGEKIT = {"ties": 30.0, "della": 30.0, "dare_ties": 15.0, "slerp": 5.0}  # 1.2B
SHARE_OF_MERGEKITS_PEAK = 0.25


def judge(rows: Sequence[Row]) -> list[Row]:
    """Each target that the rows can tell about: what it is, what was found, whether it is met."""
    found = [
        target(
            f"pymerge --help within {HELP_SECONDS} s", f"{row['wall']['median']:.2f} s", row["wall"]["median"] <= 0.4
        )
        for row in rows
        if row["kind"] == "start-up"
    ]
    merges = [row for row in rows if row["kind"] == "merge" and row["form"] == "pymerge"]
    for row in merges:
        if row["method"] in ELEMENTWISE:
            found += _of_one(row)
        elif row["method"] in WHOLE_FASTER_THAN_MERGEKIT and row["size"] == "1.2B":
            found += _faster(row, WHOLE_FASTER_THAN_MERGEKIT[row["method"]]) + _smaller(row)
    return found + _memory(merges)


def _of_one(row: Row) -> list[Row]:
    name, found = f"{row['method']}, {row['size']}", []
    if row["size"] in OVER_FLOOR:
        most, over = OVER_FLOOR[row["size"]], row["over_floor"]
        found.append(target(f"{name}: at most {most:g}x the floor", f"{over:.2f}x", over <= most))
    if row["speedup_over_mergekit"] is not None and row["size"] in FASTER_THAN_MERGEKIT:
        found += _faster(row, FASTER_THAN_MERGEKIT[row["size"]]) + _smaller(row)
    return found


def _smaller(row: Row) -> list[Row]:
    share, most = row["share_of_mergekits_peak"], SHARE_OF_MERGEKITS_PEAK
    if share is None:
        return []
    what = f"{row['method']}, {row['size']}: at most {most:.0%} of mergekit's peak memory"
    return [target(what, f"{share:.0%}", share <= most)]


def _faster(row: Row, least: float) -> list[Row]:
    speedup = row["speedup_over_mergekit"]
    if speedup is None:
        return []
    what = f"{row['method']}, {row['size']}: at least {least:g}x faster than mergekit"
    return [target(what, f"{speedup:.1f}x", speedup >= least)]


def _memory(merges: Sequence[Row]) -> list[Row]:
    """From 135M to 1.2B, memory grows by no more than the largest tensor does.

    Methods that look at whole tensors hold those of all models that are not large.
    """
    by_size = {(row["size"], row["method"]): row for row in merges}
    found = []
    for (size, method), row in by_size.items():
        small = by_size.get(("135M", method))
        if size == "1.2B" and small is not None and method not in WHOLE_FASTER_THAN_MERGEKIT:
            growth, allowed = row["peak"] - small["peak"], row["largest_tensor"] - small["largest_tensor"]
            what = (
                f"{method}: peak memory of 1.2B over that of 135M at most {format_bytes(allowed)}, the largest tensor's"
            )
            found.append(target(what, format_bytes(max(0, growth)), growth <= allowed))
    return found
