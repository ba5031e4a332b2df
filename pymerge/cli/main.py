"""The command line: all commands of `pymerge`."""

from __future__ import annotations

import atexit
import gc
from pathlib import Path
from typing import Annotated

import typer

from pymerge.cli import options
from pymerge.cli.collect import collect
from pymerge.cli.console import OUT, print_lines, print_report, reported, tensor_count
from pymerge.cli.extract import extract
from pymerge.cli.finalize import finalize
from pymerge.cli.merge import merge
from pymerge.cli.plans import show_plan
from pymerge.cli.scripts import OWN_OPTIONS, bench, demo, mergekit_multi, mergekit_yaml, wemoe
from pymerge.cli.verify import VerifyCommand, verify
from pymerge.common.events import event, recording

app = typer.Typer(
    help="Merge fine-tuned models of one base into one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command()(merge)
app.command()(finalize)


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
    device: options.Device = "auto",
    backend: options.Backend = None,
    memory: options.Memory = None,
    max_shard_size: options.ShardSize = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plans and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other merges in the outputs.")] = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
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
            progress=not quiet,
            backend=backend.value if backend else None,
            memory=memory,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
        for report in reports:
            print_report(report, quiet=quiet)


@app.command()
def plan(
    config: options.Config,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="A row for every tensor: what it is made from, with which parameters.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same and the totals as JSON.")] = False,
    memory: options.Memory = None,
    device_memory: options.DeviceMemory = None,
    max_shard_size: options.ShardSize = "5GB",
    dtype: options.Dtype = None,
    log_json: options.LogJson = None,
) -> None:
    """Check a config, and show what a merge would read, compute and write, from the files' headers alone."""
    with reported(), recording(log_json):
        form = "json" if as_json else "tensors" if tensors else ""
        show_plan(config, memory, max_shard_size, dtype, form=form, device_memory=device_memory)


@app.command()
def report(
    config: options.Config,
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for index.html and report.json.", show_default=False)
    ],
    spectra: Annotated[
        str, typer.Option(metavar="N|all", help="Compute the singular values of N linear weights; 0 for none.")
    ] = "12",
    memory: options.Memory = None,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
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


app.command()(collect)
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
