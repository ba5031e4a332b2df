"""Times what adapters are merged by: solvers in the space of the factors, whole merges, and the same in other tools.

    python -m benchmarks adapters [--parts layers merges ...] [--shapes 2048x2048x3 ...] [--size 135M 1.2B]
                                 [--methods wudi_flow ...] [--counts 1 3 8] [--rank N] [--repeat N] [--data FOLDER]

Parts:
  layers      wudi_flow and ace on one layer, without files, beside the same on whole weights
  files       one layer more of them, with all files read and written
  merges      whole merges of 1, 3 and 8 adapters on a Llama-shaped base: time, CPU time, peak memory
  mergekit    task_arithmetic of BASE+ADAPTER models beside mergekit
  truncation  adapters to one of a lower rank, on one layer, beside PEFT's svd
  extraction  an adapter out of a fine-tuned model, beside mergekit-extract-lora

mergekit and PEFT are installed in environments of their own.
Adapters have random factors in PEFT's form, on all linear layers. They and their base are made once and kept. Results
are checked before they are timed, forms take turns, medians are compared. Rows are written as soon as they are there,
to benchmarks/runs/<machine>/<date>-adapters.json; those of some parts alone to <date>-adapters-<parts>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.adapters import extraction, files, inputs, layers, merges, truncation
from benchmarks.adapters.table import tables
from benchmarks.adapters.targets import judge
from benchmarks.harness import commands, environments, synthetic, targets
from benchmarks.harness.results import ResultsFile
from benchmarks.harness.targets import Row

# What each part measures: rows, one after the other.
PARTS: Mapping[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "layers": layers.measure,
    "files": files.measure,
    "merges": merges.measure,
    "mergekit": merges.beside_mergekit,
    "truncation": truncation.measure,
    "extraction": extraction.measure,
}
# Whose environments each part takes, in which other tools are installed.
PEERS: Mapping[str, Sequence[str]] = {
    "mergekit": environments.MERGEKIT,
    "truncation": environments.PEFT,
    "extraction": environments.MERGEKIT,
}


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.adapters.run", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    for option, part, shapes in (
        ("shapes", "layers", layers.SHAPES),
        ("file-shapes", "files", files.SHAPES),
        ("truncated", "truncation", truncation.SHAPES),
    ):
        what = f"d_out x d_in x tasks of {part}; default {' '.join(shapes)}"
        parser.add_argument(f"--{option}", nargs="+", metavar="OUTxINxT", default=shapes, help=what)
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each layer and method; one call at least")
    parser.add_argument("--size", nargs="+", choices=synthetic.SHAPES, default=["135M", "1.2B"], help="of merges")
    parser.add_argument(
        "--mergekit-size", choices=synthetic.SHAPES, default="135M", help="of what runs beside mergekit"
    )
    parser.add_argument("--methods", nargs="+", choices=inputs.CORE, default=inputs.CORE, help="beside task_arithmetic")
    parser.add_argument("--counts", nargs="+", type=int, metavar="T", default=[1, 3, 8], help="numbers of adapters")
    parser.add_argument("--rank", type=int, default=16, help="of each adapter")
    parser.add_argument("--repeat", type=int, default=5, help="calls of each form")
    parser.add_argument("--data", type=Path, default=environments.cache(), help="folder of bases and adapters")
    options = parser.parse_args(arguments)
    if min(options.repeat, options.rank, *options.counts) < 1:
        parser.error("--repeat, --rank and --counts take numbers of at least 1")

    parts = [part for part in PARTS if part in options.parts]
    peers = {part: environments.versions(environments.environment(PEERS[part])) for part in parts if part in PEERS}
    name = "-".join(["adapters", *([] if len(parts) == len(PARTS) else parts)])
    results = ResultsFile(name, options=vars(options), peers=peers, torch_threads=torch.get_num_threads())
    for part in parts:
        for row in PARTS[part](options):
            results.rows.append(row)
            results.content["targets"] = judge(results.rows)
            results.write()
    console = Console(width=180)
    for table in tables(results.rows):
        console.print(table)
    targets.show(judge(results.rows), console)
    print(f"written to {results.path}")
