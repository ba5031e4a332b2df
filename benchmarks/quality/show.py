"""Tables of what `python -m benchmarks quality` measured, in Markdown, from its file alone.

python -m benchmarks quality show [SUITE|FILE] [--only table]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.harness import commands
from benchmarks.harness.results import load
from benchmarks.quality.store import chosen

Row = dict[str, Any]


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation where there are several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def header(cells: Sequence[str]) -> Iterator[str]:
    """The first two lines of a table."""
    yield line(cells)
    yield line(["---"] * len(cells))


def about(content: Row) -> str:
    """What the numbers are from."""
    machine = content["machine"]
    seeds = ", ".join(str(seed) for seed in content["seeds"])
    commits = sorted({row["commit"] for row in content["rows"] if "commit" in row})
    options = content["options"]
    return (
        f"{content['suite']}, seeds {seeds}, {options['part']} examples; {machine['device']}, {options['threads']} "
        f"threads, {content['date'][:10]}, commit {', '.join(commits)}"
    )


def table(content: Row) -> Iterator[str]:
    """Accuracies by row and task, means over the seeds; what is tuned, in words, after the name."""
    rows = [row for row in content["rows"] if row["kind"] == "table"]
    tasks = content["tasks"]
    losses = ["loss"] if all("loss" in row for row in rows) else []  # older files have none
    yield from header(["", *tasks, "mean", "of individual, %", *losses, "seconds", "peak MiB"])
    for name in dict.fromkeys(row["row"] for row in rows):
        seeds = [row for row in rows if row["row"] == name]
        cells = [f"{statistics.fmean(row['scores'][task] for row in seeds):.2f}" for task in tasks]
        cells += [over_seeds([row[column] for row in seeds]) for column in ("mean", "normalised")]
        cells += [over_seeds([row[column] for row in seeds], 4) for column in losses]
        for column, digits in (("seconds", 1), ("peak_mib", 0)):
            known = [row[column] for row in seeds if column in row]
            cells.append(f"{statistics.fmean(known):.{digits}f}" if known else "")
        yield line([name, *cells])


def tuned(content: Row) -> Iterator[str]:
    """The values that were found on validation examples."""
    rows = [row for row in content["rows"] if row["kind"] == "table" and "tuning" in row]
    seeds = sorted({row["seed"] for row in rows})
    yield from header(["tuned on validation examples", *(f"seed {seed}" for seed in seeds), "tried (all seeds)"])
    for name in dict.fromkeys(row["row"] for row in rows):
        found = {row["seed"]: row for row in rows if row["row"] == name}
        best = [max(found[seed]["tuning"], key=lambda one: one["mean"])["value"] for seed in seeds if seed in found]
        tried = sorted({one["value"] for row in found.values() for one in row["tuning"]})
        yield line([name, *(f"{value:g}" for value in best), ", ".join(f"{value:g}" for value in tried)])


def explained(content: Row) -> Iterator[str]:
    """What was tested about the order, on validation examples."""
    rows = [row for row in content["rows"] if row["kind"] == "explain"]
    yield from header(["question", "variant", *content["tasks"], "mean"])
    asked = ""
    for row in rows:
        scores = [f"{row['scores'][task]:.2f}" for task in content["tasks"]]
        question, asked = "" if row["question"] == asked else row["question"], row["question"]
        yield line([question, row["variant"], *scores, f"{row['mean']:.2f}"])


def checked(content: Row) -> Iterator[str]:
    """Ours beside FusionBench's."""
    rows = [row for row in content["rows"] if row["kind"] == "cross-check"]
    yield from header(["deltas times", "ours", "theirs", "largest difference of a task", "weights not equal"])
    for row in rows:
        cells = [f"{row['scale']:g}", f"{row['mean']:.2f}", f"{row['their_mean']:.2f}", f"{row['worst']:.2f}"]
        yield line([*cells, f"{100 * row['unequal_weights']:.2g} %"])


TABLES = {"table": table, "tuned": tuned, "explained": explained, "checked": checked}


def main(arguments: Sequence[str]) -> None:
    """Print the tables."""
    parser = commands.parser("benchmarks.quality.show", __doc__)
    parser.add_argument(
        "results", nargs="?", default="glyphs8", metavar="SUITE|FILE", help="a file, or a suite: its last run"
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args(arguments)
    content = load(chosen(options.results))
    print(about(content))
    for name in options.only:
        print("\n" + "\n".join(TABLES[name](content)))
