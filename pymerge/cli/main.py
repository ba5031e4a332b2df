"""The command line: merge, multi, plan, report, extract, verify, methods, env, wemoe, mergekit-yaml, demo, bench."""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pymerge.cli.console import (
    OUT,
    Backend,
    Config,
    Dtype,
    LogJson,
    Memory,
    OutputDtype,
    Quiet,
    ShardSize,
    Verbose,
    print_lines,
    print_warnings,
    reported,
    tensor_count,
)
from pymerge.cli.extract import FullTensors, extract
from pymerge.cli.scripts import OWN_OPTIONS, bench, demo, mergekit_multi, mergekit_yaml, wemoe
from pymerge.cli.verify import VerifyCommand, verify
from pymerge.common.events import event, recording
from pymerge.errors import ArgumentError

app = typer.Typer(
    help="Merge fine-tuned models of one base into one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    adapter: Annotated[bool, typer.Option("--adapter", help="Merge adapters into an adapter in PEFT's form.")] = False,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="exact|N|0.99",
            help="Of an adapter: its rank, or the share of s^2 that it keeps.",
            show_default="exact",
        ),
    ] = None,
    full_tensors: Annotated[
        FullTensors | None,
        typer.Option(
            "--full-tensors", help="Beside an adapter's factors: norms, biases and others.", show_default="error"
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_json: LogJson = None,
) -> None:
    """Merge the models of CONFIG into the directory OUT.

    The same command continues an interrupted merge, and verifies a finished one.
    """
    with reported(), recording(log_json, verbose=verbose):
        from pymerge import api
        from pymerge.config.merge_config import load_config

        loaded = load_config(config)
        if adapter or loaded.output == "adapter":
            if device not in ("auto", "cpu") or profile is not None:
                raise ArgumentError("an adapter is made on the CPU, without a trace; leave --device and --profile out")
            from pymerge.extraction.api import merge_adapters, merge_of_adapters

            of: dict[str, Any] = {
                "rank": rank,
                "full_tensors": full_tensors.value if full_tensors else None,
                "dtype": dtype.value if dtype else None,
                "backend": backend.value if backend else None,
                "memory": memory,
            }
            if dry_run:
                print_lines(merge_of_adapters(loaded, **of).lines())
                return
            made = merge_adapters(loaded, out, **of, progress=not quiet, overwrite=overwrite)
            if not quiet:
                print_warnings(made.warnings)
                print_lines(made.lines())
            return
        if rank is not None or full_tensors is not None:
            raise ArgumentError("--rank and --full-tensors are of adapters; add --adapter, or leave them out")
        if dry_run:
            _show_plan(config, memory, max_shard_size, dtype, device)
            return
        report = api.merge(
            loaded,
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
            print_warnings(report.warnings)
            print_lines([*report.lines(), *(report.slowest_lines() if verbose else ())])


@app.command()
def multi(
    config: Annotated[Path, typer.Argument(help="YAML file of several configs, separated by ---.", show_default=False)],
    out: Annotated[
        Path | None, typer.Argument(help="Directory of the config without a name.", show_default=False)
    ] = None,
    intermediate_dir: Annotated[
        Path | None,
        typer.Option(
            "--intermediate-dir", "-I", help="Directory of the outputs with a name.", show_default="OUT.stages"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[Backend | None, typer.Option(help="Which kernels compute.", show_default="auto")] = None,
    memory: Memory = None,
    max_shard_size: ShardSize = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plans and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other merges in the outputs.")] = False,
    quiet: Quiet = False,
    log_json: LogJson = None,
) -> None:
    """Run the merges of CONFIG, each with a `name` by which later ones use its output; the one without goes to OUT.

    The same command continues what was interrupted, and verifies what is finished.
    """
    with reported(), recording(log_json):
        from pymerge import api
        from pymerge.cli.plan_table import plan_view
        from pymerge.config.multi import read_stages

        if dry_run:
            found = read_stages(config, out, intermediate_dir)
            plans = api.plan_stages(found, device=device, memory=memory, max_shard_size=max_shard_size)
            for stage, planned in zip(found, plans, strict=True):
                OUT.print(f"{stage.name or 'without name'}: into {stage.out}", style="bold", markup=False)
                OUT.print(plan_view(planned))
            return
        reports = api.multi(
            config,
            out,
            intermediate_dir=intermediate_dir,
            device=device,
            backend=backend.value if backend else None,
            memory=memory,
            progress=not quiet,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
        if not quiet:
            for report in reports:
                print_warnings(report.warnings)
                print_lines(report.lines())


@app.command()
def plan(
    config: Config,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="A row for every tensor: what it is made from, with which parameters.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same and the totals as JSON.")] = False,
    memory: Memory = None,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    log_json: LogJson = None,
) -> None:
    """Check a config, and show what a merge would read, compute and write, from the files' headers alone."""
    with reported(), recording(log_json):
        _show_plan(config, memory, max_shard_size, dtype, form="json" if as_json else "tensors" if tensors else "")


def _show_plan(
    config: Path,
    memory: str | None,
    max_shard_size: str,
    dtype: OutputDtype | None,
    device: str = "auto",
    form: str = "",
) -> None:
    from pymerge import api
    from pymerge.cli import tensor_table
    from pymerge.cli.plan_table import plan_view

    planned = api.plan(
        config, device=device, memory=memory, max_shard_size=max_shard_size, dtype=dtype.value if dtype else None
    )
    event("plan", f"{planned.method.name}: {len(planned.steps)} tensors", **planned.summary())
    if form == "json":
        sys.stdout.write(tensor_table.plan_json(planned) + "\n")
    elif form == "tensors":
        OUT.print(tensor_table.tensor_view(planned))
    else:
        OUT.print(plan_view(planned))
        OUT.print(tensor_table.group_view(planned), soft_wrap=True)


@app.command()
def report(
    config: Config,
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for index.html and report.json.", show_default=False)
    ],
    spectra: Annotated[
        str, typer.Option(metavar="N|all", help="Compute the singular values of N linear weights; 0 for none.")
    ] = "12",
    memory: Memory = None,
    quiet: Quiet = False,
    log_json: LogJson = None,
) -> None:
    """Measure the experts of CONFIG before they are merged: who conflicts with whom, and where. Merges nothing."""
    with reported(), recording(log_json):
        from pymerge import api
        from pymerge.analysis import survey, write_report
        from pymerge.common.progress import NoProgress, ProgressBar

        planned = api.plan(config, device="cpu", memory=memory)
        found = survey(
            planned, tensor_count("--spectra", spectra, 0), NoProgress() if quiet else ProgressBar("measuring")
        )
        page = write_report(planned, found, out)
        event("report", f"wrote {page}", page=page)
        if not quiet:
            print_lines([f"wrote {page}"])


app.command()(extract)
app.command(cls=VerifyCommand)(verify)


@app.command()
def methods() -> None:
    """List the merge methods with their parameters."""
    with reported():
        from pymerge.cli.info_tables import methods_view

        OUT.print(methods_view())


@app.command("env")
def environment() -> None:
    """Show versions, devices, and which backends work (or why not)."""
    with reported():
        from pymerge.cli.info_tables import env_view

        OUT.print(env_view())


for script in (wemoe, mergekit_yaml, mergekit_multi, demo, bench):
    app.command(script.__name__.replace("_", "-"), context_settings=OWN_OPTIONS)(script)


def main() -> None:
    """Entry point of the `pymerge` command."""
    # To import PyTorch makes many objects, all of which stay: by default the garbage collector goes through them again
    # and again, and once more at the end.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    app()
