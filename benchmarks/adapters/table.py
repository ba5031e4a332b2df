"""Tables of the rows of `python -m benchmarks adapters`, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from benchmarks.harness.targets import Row
from pymerge.common.units import format_bytes


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table of each kind of rows that there is."""
    for kind, make in KINDS.items():
        found = [row for row in rows if row["kind"] == kind]
        if found:
            yield make(found)


def _layers(rows: Sequence[Row]) -> Table:
    found = Table("d_out x d_in, T", "method", "form", "seconds", "vs dense", "X differs by")
    for row in rows:
        found.add_row(
            f"{row['d_out']} x {row['d_in']}, {row['tasks']}",
            row["method"],
            row["form"],
            f"{row['seconds']['median']:.3g}",
            "" if row["form"] == "dense" else f"{row['speedup_over_dense']:.0f}x faster",
            f"{row['difference']:.1e}",
        )
    return found


def _added(rows: Sequence[Row]) -> Table:
    found = Table("d_out x d_in, T", "method", "form", "seconds a layer", "of merges of", "vs dense")
    for row in rows:
        speedup = row["speedup_over_dense"]
        found.add_row(
            f"{row['d_out']} x {row['d_in']}, {row['tasks']}",
            row["method"],
            row["form"],
            f"{row['per_layer']:.3g}",
            " and ".join(map(str, row["layers"])),
            "" if row["form"] == "dense" or speedup is None else f"{speedup:.0f}x faster",
        )
    return found


def _merges(rows: Sequence[Row]) -> Table:
    head = ("size", "method", "adapters", "form", "wall s", "CPU s", "peak", "routes")
    found = Table(*head, "over floor", "over task_arithmetic", "over one", "vs mergekit", "its peak")
    for row in rows:
        speedup, share = row["speedup_over_mergekit"], row["share_of_mergekits_peak"]
        compared = speedup is not None and row["form"] == "pymerge"
        found.add_row(
            row["size"],
            row["method"],
            str(row["adapters"]),
            row["form"],
            f"{row['wall']['median']:.2f}",
            f"{row['cpu']:.2f}",
            format_bytes(row["peak"]),
            ", ".join(f"{count} {route}" for route, count in (row["routes"] or {}).items()),
            *(_times(row[key]) for key in ("over_floor", "over_task_arithmetic", "over_one_adapter")),
            f"{speedup:.1f}x faster" if compared else "",
            f"{share:.1%}" if compared else "",
        )
    return found


def _others(rows: Sequence[Row]) -> Table:
    """Truncations and extractions, beside another tool."""
    found = Table("what", "of", "rank", "form", "seconds", "peak", "faster", "lost share of the norm")
    for row in rows:
        of = row["size"] if "size" in row else f"{row['d_out']} x {row['d_in']}, {row['tasks']}"
        seconds = row["wall"] if "wall" in row else row["seconds"]
        peak = format_bytes(row["peak"]) if "peak" in row else ""
        speedup = row.get("speedup_over_peft", row.get("speedup_over_mergekit"))
        faster = f"{speedup:.1f}x" if row["form"] == "pymerge" else ""
        of_both = (row["kind"], of, str(row["rank"]), row["form"])
        found.add_row(*of_both, f"{seconds['median']:.3g}", peak, faster, f"{row['lost']:.4f}")
    return found


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


KINDS = {"layer": _layers, "added layer": _added, "merge": _merges, "truncation": _others, "extraction": _others}
