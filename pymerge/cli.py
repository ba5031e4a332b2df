"""The command line: merge, plan, verify, methods, env, demo, bench."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from pymerge.errors import ArgumentError, OutputError, PymergeError
from pymerge.logs import event, recording

app = typer.Typer(
    help="Merge fine-tuned models of one base into one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In a file or a pipe, wide enough that tables keep one line a row.
_out = Console(width=None if sys.stdout.isatty() else 160)
_err = Console(stderr=True, highlight=False, soft_wrap=True)
_INTERRUPTED = 130
_TERMINATED = 143


class _TerminatedError(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt no Exception, so that nothing on its way up holds it."""


class Backend(str, Enum):
    auto = "auto"
    reference = "reference"
    native = "native"
    triton = "triton"
    cuda = "cuda"


class OutputDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


Config = Annotated[Path, typer.Argument(help="YAML file; mergekit's format is understood.", show_default=False)]
Memory = Annotated[
    str | None,
    typer.Option(help="Hold at most this much of tensors at once, such as 8GiB.", show_default="75% of what is free"),
]
ShardSize = Annotated[str, typer.Option(help="Start a new file above this size.")]
Dtype = Annotated[
    OutputDtype | None, typer.Option(help="Output dtype, instead of the config's or the base's.", show_default=False)
]
LogJson = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Append events as lines of JSON; - for standard error.", show_default=False),
]


@contextmanager
def _reported() -> Iterator[None]:
    """Errors as one line and an exit code; signals as a clean stop that the same command continues."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _TerminatedError

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except PymergeError as error:
        _err.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        _err.print("interrupted; the same command goes on where this one stopped", markup=False)
        raise SystemExit(_INTERRUPTED) from None
    except _TerminatedError:
        _err.print("terminated; the same command goes on where this one stopped", markup=False)
        raise SystemExit(_TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_warnings(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        _err.print(f"warning: {warning}", style="yellow", markup=False)


@app.command()
def merge(
    config: Config,
    out: Annotated[Path, typer.Argument(help="Directory of the merged model.", show_default=False)],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[Backend | None, typer.Option(help="Which kernels compute.", show_default="auto")] = None,
    memory: Memory = None,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another merge in OUT.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Write a trace of the merge for ui.perfetto.dev.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say which backend computes what, and which tensors are slow.")
    ] = False,
    log_json: LogJson = None,
) -> None:
    """Merge the models of CONFIG into the directory OUT.

    The same command continues an interrupted merge, and verifies a finished one.
    """
    with _reported(), recording(log_json, verbose=verbose):
        from pymerge import api

        if dry_run:
            _show_plan(config, memory, max_shard_size, dtype, device)
            return
        report = api.merge(
            config,
            out,
            device=device,
            backend=backend.value if backend else None,
            memory=memory,
            progress=not quiet,
            max_shard_size=max_shard_size,
            dtype=dtype.value if dtype else None,
            overwrite=overwrite,
            profile=profile,
        )
        if not quiet:
            _print_warnings(report.warnings)
            for line in [*report.lines(), *(report.slowest_lines() if verbose else ())]:
                _out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def plan(
    config: Config,
    memory: Memory = None,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    log_json: LogJson = None,
) -> None:
    """Show what a merge would read, compute and write, from the files' headers alone."""
    with _reported(), recording(log_json):
        _show_plan(config, memory, max_shard_size, dtype)


def _show_plan(
    config: Path, memory: str | None, max_shard_size: str, dtype: OutputDtype | None, device: str = "auto"
) -> None:
    from pymerge import api
    from pymerge.views import plan_view

    planned = api.plan(
        config, device=device, memory=memory, max_shard_size=max_shard_size, dtype=dtype.value if dtype else None
    )
    event("plan", f"{planned.method.name}: {len(planned.steps)} tensors", **planned.summary())
    _out.print(plan_view(planned))


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="Directory that `pymerge merge` wrote.", show_default=False)],
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity.")] = False,
    deep: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Compute N tensors (or all) again from recipe and inputs, and compare bytes.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    log_json: LogJson = None,
) -> None:
    """Read a merged model again and compare every byte with its manifest."""
    with _reported(), recording(log_json):
        from pymerge.checkpoint import read_manifest
        from pymerge.checkpoint import verify as verify_output
        from pymerge.progress import NoProgress, ProgressBar

        count = _sample_size(deep)
        manifest = read_manifest(out)
        progress = NoProgress() if quiet or manifest is None else ProgressBar("verifying")
        shards = manifest["shards"].values() if manifest else ()
        progress.start(sum(tensor["nbytes"] for shard in shards for tensor in shard["tensors"].values()))

        def advance(count: int, name: str) -> None:
            progress.tensor(name)
            progress.advance(count)

        try:
            report = verify_output(out, progress=advance, allow_nonfinite=allow_nonfinite)
        finally:
            progress.close()
        lines = [f"{out}: {report.tensors} tensors, {report.parameters:,} parameters, all as written"]
        if deep is not None and not report.problems:
            lines.append(_verify_deep(out, count, report.problems, quiet))
        if report.problems:
            raise OutputError(f"{out} is not as it was written:\n" + "\n".join(f"- {p}" for p in report.problems))
        event("verified", lines[-1], output=out, tensors=report.tensors, parameters=report.parameters)
        if not quiet:
            for line in lines:
                _out.print(line, markup=False, highlight=False, soft_wrap=True)


def _sample_size(deep: str | None) -> int | None:
    """How many tensors --deep asks for; None for all."""
    if deep is None or deep == "all":
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", deep):
        raise ArgumentError(f"--deep is {deep!r}; give a number of tensors, or all")
    return int(deep)


def _verify_deep(out: Path, count: int | None, problems: list[str], quiet: bool) -> str:
    """Compute tensors again; adds to `problems` and returns the summary."""
    from pymerge.progress import NoProgress, ProgressBar
    from pymerge.recheck import recheck

    found = recheck(out, count, progress=NoProgress() if quiet else ProgressBar("computing again"))
    changed = [f"changed since the merge: {change}" for change in found.changes]
    if found.problems:
        problems += found.problems + changed
    elif not quiet:
        _print_warnings(tuple(changed))
    text = f"{out}: {len(found.tensors)} tensors computed again, the same bytes"
    event("recomputed", text, tensors=found.tensors, changes=found.changes, problems=found.problems)
    return text


@app.command()
def methods() -> None:
    """List the merge methods with their parameters."""
    _print_view("methods_view")


@app.command("env")
def environment() -> None:
    """Show versions, devices, and which backends work (or why not)."""
    _print_view("env_view")


def _print_view(name: str) -> None:
    with _reported():
        from pymerge import views

        view: Callable[[], Any] = getattr(views, name)
        _out.print(view())


# Scripts of the checkout, and groups of commands that import PyTorch, take their own options, --help among them.
_SCRIPT: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_SCRIPT)
def demo(context: typer.Context) -> None:
    """Merge the example experts by every method and compare them on their tasks (in a checkout only)."""
    _run_script("examples/glyphs/demo.py", context.args)


@app.command(context_settings=_SCRIPT)
def bench(context: typer.Context) -> None:
    """Time every op on every backend that runs here, beside PyTorch (in a checkout only)."""
    _run_script("benchmarks/bench_ops.py", context.args)


@app.command(context_settings=_SCRIPT)
def wemoe(context: typer.Context) -> None:
    """Merged models whose MLPs mix base and experts for each input: adapt."""
    with _reported():
        from pymerge.wemoe.cli import wemoe_app

        wemoe_app(args=context.args, prog_name="pymerge wemoe")


def _run_script(name: str, arguments: list[str]) -> NoReturn:
    with _reported():
        script = Path(__file__).resolve().parent.parent / name
        if not script.is_file():
            raise OutputError(f"{name} is not installed ({script} is missing); clone the repository for it")
        raise SystemExit(subprocess.run([sys.executable, str(script), *arguments], check=False).returncode)


def main() -> None:
    """Entry point of the `pymerge` command."""
    app()
