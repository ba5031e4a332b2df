"""Merge the five experts with every config in configs/ and show how well each merge does on every task.

Each merge is the real command, `python -m pymerge merge CONFIG OUT --quiet`, in a process of its own; the
merged folder is then loaded and asked to recognise the held-out images of testset.safetensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from examples.glyphs.model import GlyphVit, cosine_logits, load_model
from pymerge.testing.bench import machine

HERE = Path(__file__).resolve().parent
TASKS = ("digits", "latin", "greek", "cyrillic", "hebrew")
MERGES = (
    "average",
    "task_arithmetic",
    "wudi",
    "wudi_auto",
    "wudi_flow",
    "ace",
)  # files of configs/, in the table's order


@torch.no_grad()
def accuracy(model: GlyphVit, testset: dict[str, Tensor], task: str, part: str) -> float:
    """Percent of the task's held-out images recognised, with the frozen head of the task."""
    images = testset[f"{task}.{part}.images"].float() / 255
    labels = testset[f"{task}.{part}.labels"].long()
    mean, head = testset[f"{task}.mean"].float(), testset[f"{task}.head"].float()
    return 100 * (cosine_logits(model(images), mean, head).argmax(1) == labels).double().mean().item()


def merge(config: Path, out: Path) -> float:
    """Run the merge command; returns its wall-clock seconds, start of the interpreter included.

    Raises SystemExit with the command's own output when it fails.
    """
    command = [sys.executable, "-m", "pymerge", "merge", str(config), str(out), "--quiet"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{said}")
    return time.perf_counter() - start


def row(scores: list[float], seconds: float | None = None) -> dict[str, float]:
    """Accuracies by task, their mean, and the seconds of the merge when there was one."""
    result = dict(zip(TASKS, scores, strict=True)) | {"mean": sum(scores) / len(scores)}
    return result if seconds is None else result | {"seconds": seconds}


def evaluate(part: str, folder: Path, console: Console) -> dict[str, dict[str, float]]:
    """Rows of the table: base, individual experts, and a merge for every config, written below `folder`."""
    testset = load_file(HERE / "testset.safetensors")
    base = load_model(HERE / "base")
    experts = {task: load_model(HERE / "experts" / task) for task in TASKS}
    rows = {
        "base": row([accuracy(base, testset, task, part) for task in TASKS]),
        "individual": row([accuracy(experts[task], testset, task, part) for task in TASKS]),
    }
    for name in MERGES:
        with console.status(f"merging: {name}"):
            seconds = merge(HERE / "configs" / f"{name}.yml", folder / name)
            merged = load_model(folder / name)
            rows[name] = row([accuracy(merged, testset, task, part) for task in TASKS], seconds)
    return rows


def show(rows: dict[str, dict[str, float]], console: Console) -> None:
    """Print the rows as one table; the best merge of every column is bold."""
    table = Table(title="accuracy in % on held-out images", box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in (*TASKS, "mean", "seconds"):
        table.add_column(column, justify="right")
    columns = (*TASKS, "mean")
    merges = [name for name in rows if "seconds" in rows[name]]
    best = {column: max(rows[name][column] for name in merges) for column in columns}
    for name, scores in rows.items():
        cells = [f"{scores[column]:.1f}" for column in columns]
        if name in merges:
            cells = [
                f"[bold]{cell}[/bold]" if scores[column] == best[column] else cell
                for cell, column in zip(cells, columns, strict=True)
            ]
        seconds = f"{scores['seconds']:.1f}" if "seconds" in scores else ""
        table.add_row(name, *cells, seconds, end_section=name in ("individual", "individual adapters"))
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the unrounded numbers to FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the merged models in DIR, a new one")
    parser.add_argument("--part", choices=("test", "validation"), default="test", help="images to measure on")
    args = parser.parse_args()
    console = Console()
    if args.keep and args.keep.exists():
        parser.error(f"{args.keep} exists; name a folder that doesn't")
    if args.keep:
        args.keep.mkdir(parents=True)
        rows = evaluate(args.part, args.keep, console)
    else:
        with tempfile.TemporaryDirectory(prefix="pymerge-glyphs-") as folder:
            rows = evaluate(args.part, Path(folder), console)
    show(rows, console)
    if args.json:
        content = {"machine": machine(), "part": args.part, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
