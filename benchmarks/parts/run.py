"""Times merges in parts beside merges by one process, and the step that publishes parts.

    python -m benchmarks parts [--size 20M] [--method wudi_flow] [--repeat N] [--data FOLDER]

Three things. `shard`: a linear merge file by file, each by an assignment whose plan was shipped, as a task of Ray's is
carried out, beside one merge of all, whose bytes it must write; the difference is what a file costs more. `processes`:
a merge by a solver with two processes of one thread each (--devices cpu,cpu) beside one process of two threads, start
and end included; whether they write the same bytes is recorded. `finalize`: the time in which what parts have made
becomes a model, without and with their checksums. Forms take turns, medians are compared.
Rows go to benchmarks/runs/<machine>/<date>-parts.json.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import commands, environments, processes, synthetic, targets
from benchmarks.harness.results import ResultsFile
from benchmarks.harness.targets import Row, target
from pymerge import api
from pymerge.common.progress import NoProgress
from pymerge.engine.assignment import Assignment, pack
from pymerge.testing.bench import summary

FILES = 12  # of the output, about
OVERHEAD = 1.0  # seconds a file, at most
SPEED = 0.95  # of two processes beside two threads, at least


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.parts.run", __doc__)
    parser.add_argument("--size", choices=synthetic.SHAPES, default="20M", help="of the models")
    parser.add_argument("--method", default="wudi_flow", help="solver of `processes`")
    parser.add_argument("--repeat", type=int, default=3, help="merges of each form")
    parser.add_argument("--data", type=Path, default=environments.cache(), help="folder of the models and the outputs")
    options = parser.parse_args(arguments)
    if options.repeat < 1:
        parser.error("--repeat takes a number of at least 1")
    results = ResultsFile("parts", options=vars(options), torch_threads=torch.get_num_threads())
    for row in measure(options):
        results.rows.append(row)
        results.content["targets"] = judge(results.rows)
        results.write()
    targets.show(judge(results.rows), Console(width=140))
    print(f"written to {results.path}")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The rows."""
    folder = synthetic.make(options.size, options.data)
    size = max(1, synthetic.SHAPES[options.size].nbytes() // FILES)
    with tempfile.TemporaryDirectory(dir=options.data) as work:
        linear = config(Path(work), folder, "linear", {"weight": 0.3})
        yield from by_files(linear, Path(work), size, options.repeat)
        solver = config(Path(work), folder, options.method, {})
        yield by_processes(solver, Path(work), size, options.repeat, options.method)


def config(work: Path, models: Path, method: str, parameters: dict[str, Any]) -> Path:
    """The file of a merge of the experts."""
    lines = [f"merge_method: {method}", f"base_model: {models / synthetic.MODELS[0]}", "models:"]
    lines += [f"  - model: {models / name}" for name in synthetic.MODELS[1:]]
    lines += ["parameters:", *(f"  {name}: {value}" for name, value in parameters.items())] if parameters else []
    path = work / f"{method}.yml"
    path.write_text("\n".join(lines) + "\n")
    return path


def by_files(config: Path, work: Path, size: int, repeat: int) -> Iterator[Row]:
    """Rows `shard` and `finalize`."""
    plan = api.plan(config, device="cpu", max_shard_size=size)
    packed = pack(plan)
    whole, apart, end, checked = [], [], [], []
    for number in range(repeat + 1):  # the first time, files come into the page cache
        one, other, third = (work / f"{name}{number}" for name in ("one", "apart", "third"))
        whole.append(timed(lambda one=one: api.run(plan, one, progress=False)))
        apart.append(timed(lambda other=other: _each_alone(plan, packed, other)))
        shutil.copytree(other, third)
        end.append(timed(lambda other=other: api.finalize(plan, other, progress=False, verify=False)))
        checked.append(timed(lambda third=third: api.finalize(plan, third, progress=False, verify=True)))
        expected = digests(one)
        for out in (other, third):
            check(digests(out) == expected, f"{out} has other bytes than a merge by one process")
        for out in (one, other, third):
            shutil.rmtree(out)
    files = len(plan.files)
    costs = [(parts + publish - one) / files for parts, publish, one in zip(apart, end, whole, strict=True)][1:]
    yield {
        "what": "shard",
        "files": files,
        "plan_bytes": len(packed),
        "one": summary(whole[1:]),
        "apart": summary(apart[1:]),
        "overhead": statistics.median(costs),
    }
    yield {"what": "finalize", "files": files, "bytes": plan.bytes_written, "plain": summary(end[1:])} | {
        "verify": summary(checked[1:])
    }


def _each_alone(plan: Any, packed: bytes, out: Path) -> None:
    """Merge the files one by one, each as a process would that is given this one alone."""
    for layout in plan.files:
        Assignment(packed, out, (layout.file,), "cpu", plan.budget.host).carry_out(NoProgress())


def by_processes(config: Path, work: Path, size: int, repeat: int, method: str) -> Row:
    """The row `processes`."""
    command = [*processes.module("pymerge"), "merge", str(config), "--quiet", "--max-shard-size", str(size)]
    variables = {**processes.variables(), "OMP_NUM_THREADS": "2"}
    forms = {"one": ["--device", "cpu"], "two": ["--devices", "cpu,cpu"]}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    same = True
    for number in range(repeat):
        outs = {name: work / f"{name}-{number}" for name in forms}
        for name, more in forms.items():
            seconds[name].append(processes.run([*command, str(outs[name]), *more], variables).wall)
        same = same and digests(outs["one"]) == digests(outs["two"])
        for out in outs.values():
            shutil.rmtree(out)
    speed = statistics.median(seconds["one"]) / statistics.median(seconds["two"])
    return {"what": "processes", "method": method, **{name: summary(each) for name, each in seconds.items()}} | {
        "speed": speed,
        "same_bytes": same,
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as stream:
            found[str(file.relative_to(folder))] = hashlib.sha256(stream.read()).hexdigest()
    return found


def check(right: bool, otherwise: str) -> None:
    """Raise SystemExit unless it is right."""
    if not right:
        raise SystemExit(otherwise)


def judge(rows: Sequence[Row]) -> list[Row]:
    """What should be reached at least."""
    judged = []
    for row in rows:
        if row["what"] == "shard":
            found = f"{row['overhead']:.3f} s"
            judged.append(target(f"a file costs {OVERHEAD:g} s more at most", found, row["overhead"] <= OVERHEAD))
        elif row["what"] == "processes":
            found = f"{row['speed']:.2f}x"
            wanted = f"{row['method']} by two processes, beside two threads: {SPEED}x at least"
            judged.append(target(wanted, found, row["speed"] >= SPEED))
    return judged
