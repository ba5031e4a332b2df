"""`pymerge wemoe`: build a model that mixes its experts per input, describe one, and adapt its routers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pymerge.checkpoint.checkpoint import read_header
from pymerge.cli import options
from pymerge.cli.console import OUT, print_lines, print_warnings
from pymerge.cli.plan_table import plan_view
from pymerge.cli.wemoe_adapt import adapt_command
from pymerge.common.events import event, recording
from pymerge.common.units import format_bytes
from pymerge.wemoe.build import build, plan_build
from pymerge.wemoe.router import router_count
from pymerge.wemoe.router_file import ROUTER_NAME
from pymerge.wemoe.spec import read_spec

_NAMES_SHOWN = 8


def build_command(
    config: options.Config,
    out: Annotated[Path, typer.Argument(help="Directory of the model.", show_default=False)],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N, for the static merge.")] = "auto",
    backend: options.Backend = None,
    memory: options.Memory = None,
    max_shard_size: options.ShardSize = "5GB",
    dtype: options.Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another output in OUT.")] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    log_json: options.LogJson = None,
) -> None:
    """Build a WEMoE directory OUT from the base and experts of CONFIG, a merge config with a section wemoe.

    The same command continues an interrupted build, and verifies a finished one.
    """
    with recording(log_json, verbose=verbose):
        given = options.for_plan(backend, memory, max_shard_size, dtype)
        if dry_run:
            planned = plan_build(config, device=device, **given)
            OUT.print(plan_view(planned.static))
            print_lines(planned.lines())
            return
        report = build(config, out, device=device, **given, progress=not quiet, overwrite=overwrite)
        if not quiet:
            print_warnings(report.merge.warnings)
            print_lines([*report.lines(), *(report.merge.slowest_lines() if verbose else ())])


def info_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a WEMoE model.", show_default=False)],
    log_json: options.LogJson = None,
) -> None:
    """Say what a WEMoE directory holds: experts, modules, routers, sizes."""
    with recording(log_json):
        spec = read_spec(folder)
        storage, router = spec.storage, spec.router
        stored = read_header(folder / ROUTER_NAME).entries.values()
        more = {"ratio": storage.ratio, "rank": storage.rank, "energy": storage.energy}
        given = "".join(f", {name} {value:g}" for name, value in more.items() if value is not None)
        paths = [module.path for module in spec.modules]
        rest = len(paths) - _NAMES_SHOWN
        number = "one shared router" if router.shared else f"{router_count(spec)} routers"
        code = " with layer code" if router.layer_code else ""
        print_lines(
            [
                f"{spec.architecture}, {spec.tasks} experts: {', '.join(spec.experts)}",
                f"{len(paths)} modules of {sum(len(module.parameters) for module in spec.modules)} parameters: "
                + ", ".join(paths[:_NAMES_SHOWN])
                + (f" and {rest} more" if rest > 0 else ""),
                f"{number} of depth {router.depth}{code}, {sum(entry.numel for entry in stored):,} parameters, "
                f"{format_bytes(sum(entry.nbytes for entry in stored))}; gates start at {spec.init_lambda:g} and are "
                f"reduced over each {spec.reduce}",
                f"task vectors: {storage.kind} {storage.dtype}{given}, {format_bytes(storage.stored_bytes)} "
                f"(dense {format_bytes(storage.dense_bytes)})",
            ]
        )
        sizes = {"stored_bytes": storage.stored_bytes, "dense_bytes": storage.dense_bytes}
        event("wemoe_info", f"{folder}: {spec.tasks} experts, {len(paths)} modules", experts=spec.experts, **sizes)


wemoe_app = typer.Typer(
    help="Merged models whose modules mix base and experts for each input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
wemoe_app.command("build")(build_command)
wemoe_app.command("info")(info_command)
wemoe_app.command("adapt")(adapt_command)
