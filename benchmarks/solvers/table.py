"""Table of the rows of `python -m benchmarks solvers`, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> Table:
    """The rows of one shape: for times the ratio is the peer's over ours, else ours over the peer's."""
    found = Table("d_out x d_in, T", "what", "against", "ours", "theirs", "ratio", "target", "met", "X differs by")
    for row in rows:
        shape = f"{row['d_out']} x {row['d_in']}, {row['tasks']}"
        what = " ".join(str(row[key]) for key in ("method", "precision") if row.get(key))
        what += f" eps {row['eps']:g}" if row.get("eps") else ""
        if row["kind"] == "skipped":
            found.add_row(shape, what, row["form"], "skipped", f"~{row['seconds_expected']:.0f} s", "", "", "", "")
            continue
        if row["kind"] == "alone":
            found.add_row(shape, what, "", f"{row['seconds']['median']:.3g} s", "", "", "", "", "")
            continue
        if row["kind"] == "disagreement":
            worst = max(check["difference"] for check in row["checks"].values())
            found.add_row(shape, what, "", "not timed", "", "", "", "no", f"{worst:.1e}")
            continue
        if row["kind"] == "memory":
            values = [f"{row['mib']:.0f} MiB", f"{row['peer_mib']:.0f} MiB"]
        else:
            scaled = "~" if row["peer_seconds"].get("scaled") else ""
            values = [f"{row['seconds']['median']:.3g} s", f"{scaled}{row['peer_seconds']['median']:.3g} s"]
        if row["kind"] == "steps_over_gemm":
            what = f"{row['steps']} steps"
        limit = "" if row["target"] is None else f"{'>=' if row['kind'] == 'time' else '<='} {row['target']:g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        check = row.get("check")
        difference = f"{check['difference']:.1e}" if check else ""
        found.add_row(shape, what, row["peer"], *values, ratio, limit, met, difference)
    return found
