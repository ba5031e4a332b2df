"""How much of the memory's speed `combine` reaches: bytes a second of the C++ op and of plain copies, in turns.

    python -m benchmarks ops bandwidth [--elements N] [--models T] [--threads N] [--seconds S]

linear (sum of T models) and task_arithmetic (a base beside them), in bfloat16 and float32, on tensors far larger than
the caches. A copy is memmove in as many threads, each of one part, of as many bytes as the op reads and writes
together; an op should reach the share of its rate that `TARGET` names. Bytes are those that must move: every input
once, the output once. Results go to benchmarks/runs/<machine>/<date>-bandwidth.json.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from pymerge.backends.runner import Runner
from pymerge.common.dtypes import code_of
from pymerge.ops.combine import Combine
from pymerge.testing.bench import summary, time_in_turns

TARGET = 0.6
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Row = dict[str, Any]


class Copies:
    """Copies of `nbytes` in all, read and written, by a team of threads."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self._source = torch.ones(nbytes // 2, dtype=torch.uint8)
        self._target = torch.zeros_like(self._source)
        self._part = math.ceil(len(self._source) / threads)
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> None:
        list(self._pool.map(self._copy, range(0, len(self._source), self._part)))

    def _copy(self, start: int) -> None:
        nbytes = min(self._part, len(self._source) - start)
        ctypes.memmove(self._target.data_ptr() + start, self._source.data_ptr() + start, nbytes)


def compare(method: str, dtype: str, options: argparse.Namespace) -> Row:
    """One op against copies of as many bytes. Before it is timed, some of its result is compared with float64."""
    shape, kind = (options.elements // 1024, 1024), DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(shape, generator=generator).to(kind) for _ in range(options.models)]
    base = torch.randn(shape, generator=generator).to(kind) if method == "task_arithmetic" else None
    weights, out = [1.0 / options.models] * options.models, torch.empty(shape, dtype=kind)
    call = partial(Runner("native"), Combine(base, models, weights, code_of(kind), out))
    call()
    error = float((out[:64].double() - expected(base, models, weights, 64)).abs().max())
    if not error <= torch.finfo(kind).eps * 8:
        raise SystemExit(f"{method}, {dtype}: differs from float64 by {error:.1e}: not timed")
    nbytes = (options.models + (base is not None) + 1) * out.nbytes
    forms: dict[str, Callable[[], Any]] = {"combine": call, "copy": Copies(nbytes, options.threads)}
    processor = {name: processor_seconds(form) for name, form in forms.items()}
    times = {name: summary(each) for name, each in time_in_turns(forms, seconds=options.seconds).items()}
    return {
        "method": method,
        "dtype": dtype,
        "bytes": nbytes,
        "seconds": times["combine"],
        "copy_seconds": times["copy"],
        "rate": nbytes / times["combine"]["median"],
        "copy_rate": nbytes / times["copy"]["median"],
        "share": times["copy"]["median"] / times["combine"]["median"],
        # On a machine with other work wall times say little: processor time, of one call each.
        "share_of_processor_time": processor["copy"] / processor["combine"],
    }


def expected(base: Tensor | None, models: list[Tensor], weights: list[float], rows: int) -> Tensor:
    """The first rows in float64."""
    origin = torch.zeros(rows, models[0].shape[1], dtype=torch.float64) if base is None else base[:rows].double()
    for model, weight in zip(models, weights, strict=True):
        origin = origin + weight * (model[:rows].double() - (0.0 if base is None else base[:rows].double()))
    return origin


def processor_seconds(form: Callable[[], Any]) -> float:
    """Processor time of the second of two calls, all threads together."""
    form()
    before = resource.getrusage(resource.RUSAGE_SELF)
    form()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(rows: list[Row]) -> Table:
    """What a person reads of the rows."""
    found = Table("method", "dtype", "GB/s", "copy GB/s", "share", "by processor time", f"at least {TARGET:.0%}")
    for row in rows:
        shares = f"{row['share']:.0%}", f"{row['share_of_processor_time']:.0%}"
        rates = f"{row['rate'] / 1e9:.1f}", f"{row['copy_rate'] / 1e9:.1f}"
        found.add_row(row["method"], row["dtype"], *rates, *shares, "met" if row["share"] >= TARGET else "not met")
    return found


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.ops.bandwidth", __doc__)
    parser.add_argument("--elements", type=int, default=2**26, help="of each tensor")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each op and its copies")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = ResultsFile("bandwidth", options=vars(options), target=TARGET)
    for method in ("linear", "task_arithmetic"):
        for dtype in DTYPES:
            results.rows.append(compare(method, dtype, options))
            results.write()
    Console(width=120).print(table(results.rows))
    print(f"written to {results.path}")
