"""Times `pymerge wemoe build` of three experts against the disk: the same bytes read once, the same bytes written.

    python -m benchmarks wemoe build [--models clip-B-32 1.2B] [--storages dense pruned] [--repeat N]
                                     [--memory LIMIT] [--data FOLDER]

Models are a CLIP-ViT-B/32 vision tower (float32, 0.35 GB each) and Llama's shapes of synthetic.py (bfloat16), of random
weights, made once and kept. The floor reads all input files into one buffer, writes and syncs as many bytes as the
build wrote, and computes nothing. Commands run in processes of their own, forms take turns, medians are compared; all
files are in the page cache as far as it holds them. Results go to benchmarks/runs/<machine>/<date>-wemoe-build.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import commands, environments, processes, synthetic
from benchmarks.harness.processes import Cost
from benchmarks.harness.results import ResultsFile
from benchmarks.merges.floor import BLOCK, floor, read
from pymerge.common.units import format_bytes
from pymerge.wemoe import read_spec

STORAGES = {
    "dense": "{kind: dense}",
    "pruned": "{kind: pruned, ratio: 0.9}",
    "low_rank": "{kind: low_rank, rank: 16}",
}
# Hidden size, inner size, blocks, heads, image size, patch size.
TOWERS = {"clip-tiny": (64, 128, 2, 4, 32, 16), "clip-B-32": (768, 3072, 12, 12, 224, 32)}
NOISE = 5e-4

Row = dict[str, Any]


def checkpoints(model: str, data: Path) -> Path:
    """The folder of a model's base and three experts, made if it is not there."""
    if model in synthetic.SHAPES:
        return synthetic.make(model, data)
    folder = data / f"{model}-{synthetic.RECIPE}"
    if all((folder / name).exists() for name in synthetic.MODELS):
        return folder
    from transformers import CLIPVisionConfig, CLIPVisionModel

    hidden, inner, blocks, heads, image, patch = TOWERS[model]
    torch.manual_seed(0)
    tower: Any = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            image_size=image,
            patch_size=patch,
        )
    )
    base = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    for name in synthetic.MODELS:
        partial_folder = folder / f"{name}.partial"
        shutil.rmtree(partial_folder, ignore_errors=True)
        tower.save_pretrained(partial_folder)
        shutil.rmtree(folder / name, ignore_errors=True)
        partial_folder.rename(folder / name)
        moved = {
            key: value + NOISE * torch.randn(value.shape) if value.is_floating_point() else value
            for key, value in base.items()
        }
        tower.load_state_dict(moved)
    return folder


def alone(out: Path, form: Callable[[], Cost]) -> Cost:
    """What a form takes when nothing of the one before is there, or left to be written."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return form()


def compare(model: str, storage: str, options: argparse.Namespace) -> list[Row]:
    """Rows of one build: the floor and pymerge, in turns."""
    folder, work = checkpoints(model, options.data), options.data / "work"
    work.mkdir(exist_ok=True)
    file, out = work / f"{model}-{storage}.yml", work / "out"
    listed = "".join(f"  - model: {folder / name}\n" for name in synthetic.MODELS[1:])
    section = f"wemoe:\n  storage: {STORAGES[storage]}\n"
    file.write_text(f"base_model: {folder / 'base'}\nmodels:\n{listed}{section}")
    inputs = [path for name in synthetic.MODELS for path in sorted((folder / name).glob("*.safetensors"))]
    command: list[str | Path] = [Path(sys.executable).parent / "pymerge", "wemoe", "build", file, out, "--quiet"]
    command += ["--memory", options.memory] if options.memory else []
    read(inputs, memoryview(bytearray(BLOCK)))  # into the page cache, before anyone's turn
    costs: dict[str, list[Cost]] = {"pymerge": [], "floor": []}
    written = sizes = 0
    for _ in range(options.repeat):
        costs["pymerge"].append(alone(out, partial(processes.run, command)))
        written = sum(each.stat().st_size for each in out.glob("*.safetensors"))
        sizes = read_spec(out).storage.stored_bytes
        costs["floor"].append(alone(out, partial(floor, inputs, written, out)))
    shutil.rmtree(work)
    nbytes = sum(path.stat().st_size for path in inputs)
    least = statistics.median(cost.wall for cost in costs["floor"])
    rows = []
    for name, found in costs.items():
        walls = [cost.wall for cost in found]
        row: Row = {"kind": "wemoe build", "model": model, "storage": storage, "form": name}
        row["wall"] = {"min": min(walls), "median": statistics.median(walls), "calls": len(walls)}
        row |= {"cpu": statistics.median(cost.cpu for cost in found), "peak": max(cost.peak for cost in found)}
        row |= {"bytes_read_at_least": nbytes, "bytes_written": written, "task_vector_bytes": sizes}
        rows.append({**row, "over_floor": row["wall"]["median"] / least})
    return rows


def table(rows: list[Row]) -> Table:
    """What a person reads of the rows."""
    found = Table("model", "storage", "form", "wall s", "CPU s", "peak", "task vectors", "written", "over floor")
    for row in rows:
        sizes = [format_bytes(row[key]) for key in ("peak", "task_vector_bytes", "bytes_written")]
        times = f"{row['wall']['median']:.2f}", f"{row['cpu']:.2f}"
        found.add_row(row["model"], row["storage"], row["form"], *times, *sizes, f"{row['over_floor']:.2f}x")
    return found


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.wemoe.build", __doc__)
    parser.add_argument("--models", nargs="+", choices=[*TOWERS, *synthetic.SHAPES], default=["clip-B-32", "1.2B"])
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=["dense", "pruned"])
    parser.add_argument("--repeat", type=int, default=3, help="builds of each kind")
    parser.add_argument("--memory", help="limit given to the builds, such as 2GiB; default: none")
    parser.add_argument("--data", type=Path, default=environments.cache(), help="folder of the checkpoints")
    options = parser.parse_args(arguments)
    results = ResultsFile("wemoe-build", options=vars(options), torch_threads=torch.get_num_threads())
    for model in options.models:
        for storage in options.storages:
            results.rows += compare(model, storage, options)
            results.write()
    Console(width=140).print(table(results.rows))
    print(f"written to {results.path}")
