"""Merge the five experts as adapters of a low rank, and show how well each merge does on every task.

`pymerge extract` makes an adapter of each expert; with --trained those are merged that were trained as such
(train_adapters.py). The merges read these: sums, TIES element by element, and methods that are solved in the space of
the factors. What they make is asked to recognise the held-out images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

import pymerge
from examples.glyphs.demo import HERE, TASKS, accuracy, row, show
from examples.glyphs.model import load_model
from pymerge.testing.bench import machine

TRAINED = HERE / "adapters"
# Methods in the table's order, with their parameters.
MERGES = {
    "task_arithmetic": "{weight: 0.4}",
    "ties": "{weight: 0.5, density: 0.5}",
    "knots": "{}",
    "core_space": "{}",
    "tsv_m": "{}",
    "iso_c": "{mean_over: rank}",
    "wudi_flow": "{}",
}


def merged(
    adapters: Path, folder: Path, name: str, method: str, parameters: str, tasks: tuple[str, ...] = TASKS
) -> Path:
    """Merge the adapters of these tasks by one method; the folder of the model."""
    models = "".join(f"  - model: {adapters}/{task}\n" for task in tasks)
    config = folder / f"{name}.yml"
    config.write_text(f"merge_method: {method}\nbase_model: {HERE}/base\nmodels:\n{models}parameters: {parameters}\n")
    pymerge.merge(config, folder / name, progress=False)
    return folder / name


def extract_adapters(rank: int, folder: Path) -> Path:
    """Extract an adapter of every expert; their folder."""
    for task in TASKS:
        pymerge.extract(HERE / "base", HERE / "experts" / task, folder / task, rank=rank, progress=False)
    return folder


def evaluate(part: str, adapters: Path, folder: Path, console: Console) -> dict[str, dict[str, float]]:
    """Rows of the table: base, experts, each adapter on its task, and a merge of all by every method."""
    testset = load_file(HERE / "testset.safetensors")

    def scores(models: dict[str, Path]) -> list[float]:
        return [accuracy(load_model(model), testset, task, part) for task, model in models.items()]

    with console.status("each adapter alone"):
        weight = "{weight: 1.0}"
        alone = {task: merged(adapters, folder, task, "task_arithmetic", weight, (task,)) for task in TASKS}
    rows = {
        "base": row(scores(dict.fromkeys(TASKS, HERE / "base"))),
        "individual experts": row(scores({task: HERE / "experts" / task for task in TASKS})),
        "individual adapters": row(scores(alone)),
    }
    for method, parameters in MERGES.items():
        with console.status(f"merging: {method}"):
            start = time.perf_counter()
            out = merged(adapters, folder, method, method, parameters)
            seconds = time.perf_counter() - start
        rows[method] = row(scores(dict.fromkeys(TASKS, out)), seconds)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--rank", type=int, default=16, help="of what is extracted (default 16)")
    source.add_argument("--trained", action="store_true", help="merge the adapters that were trained as such")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the unrounded numbers to FILE")
    parser.add_argument("--part", choices=("test", "validation"), default="test", help="images to measure on")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="pymerge-glyphs-") as folder:
        made = Path(folder, "adapters")
        adapters = TRAINED if args.trained else extract_adapters(args.rank, made)
        rows = evaluate(args.part, adapters, Path(folder), console)
    show(rows, console)
    if args.json:
        scores = {name: {column: found[column] for column in (*TASKS, "mean")} for name, found in rows.items()}
        rank = "trained" if args.trained else args.rank
        content = {"machine": machine(), "part": args.part, "rank": rank, "rows": scores}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
