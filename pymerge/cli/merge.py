"""The command `pymerge merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pymerge.cli import options
from pymerge.cli.console import print_lines, print_report, reported
from pymerge.cli.extract import FullTensors
from pymerge.cli.finalize import OTHERS_ARE_MISSING, finalized
from pymerge.cli.plans import show_plan
from pymerge.common.events import recording
from pymerge.errors import ArgumentError

if TYPE_CHECKING:
    from pymerge.planner.parts import Part


def merge(
    config: options.Config,
    out: Annotated[Path, typer.Argument(help="Directory of the merged model.", show_default=False)],
    device: options.Device = "auto",
    backend: options.Backend = None,
    memory: options.Memory = None,
    device_memory: options.DeviceMemory = None,
    max_shard_size: options.ShardSize = "5GB",
    dtype: options.Dtype = None,
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
    devices: Annotated[
        str | None,
        typer.Option(metavar="cuda:0,cuda:1|all", help="A process on each of these devices.", show_default=False),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="local|auto|ADDRESS", help="By the nodes of a Ray cluster.", show_default=False),
    ] = None,
    ray_cpus: Annotated[int | None, typer.Option("--ray-cpus", help="CPUs of each task.", show_default="1")] = None,
    ray_gpus: Annotated[
        int | None, typer.Option("--ray-gpus", help="GPUs of each task: 0 or 1.", show_default="0")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Merge part I of N, beside other processes or machines.", show_default=False),
    ] = None,
    finalize: Annotated[
        bool, typer.Option("--finalize", help="After the last part make a model of all; exit code 3 after others.")
    ] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    log_json: options.LogJson = None,
) -> None:
    """Merge the models of CONFIG into the directory OUT.

    The same command continues an interrupted merge, and verifies a finished one. What parts have made becomes a model
    by `pymerge finalize`.
    """
    with reported(), recording(log_json, verbose=verbose):
        from pymerge import api
        from pymerge.config.merge_config import load_config

        share = _part(part, finalize, overwrite)
        if ray is None and (ray_cpus is not None or ray_gpus is not None):
            raise ArgumentError("--ray-cpus and --ray-gpus are of tasks of Ray; add --ray, or leave them out")
        given = options.for_plan(backend, memory, max_shard_size, dtype, device_memory=device_memory)
        loaded = load_config(config)
        if adapter or loaded.output == "adapter":
            if device not in ("auto", "cpu") or profile is not None:
                raise ArgumentError("an adapter is made on the CPU, without a trace; leave --device and --profile out")
            if share is not None or devices is not None or ray is not None:
                raise ArgumentError("an adapter is made by one process; leave --part, --devices and --ray out")
            from pymerge.extraction.api import merge_adapters, merge_of_adapters

            of = {name: value for name, value in given.items() if name not in ("max_shard_size", "device_memory")}
            of |= {"rank": rank, "full_tensors": full_tensors.value if full_tensors else None}
            if dry_run:
                print_lines(merge_of_adapters(loaded, **of).lines())
                return
            made = merge_adapters(loaded, out, **of, progress=not quiet, overwrite=overwrite)
            print_report(made, quiet=quiet)
            return
        if rank is not None or full_tensors is not None:
            raise ArgumentError("--rank and --full-tensors are of adapters; add --adapter, or leave them out")
        if dry_run:
            show_plan(config, memory, max_shard_size, dtype, device, part=share, device_memory=device_memory)
            return
        how: dict[str, Any] = {"progress": not quiet, "overwrite": overwrite, "profile": profile}
        if ray is not None:
            if devices is not None or share is not None or profile is not None or device != "auto":
                raise ArgumentError("Ray decides where; leave --device, --devices, --part and --profile out")
            from pymerge.integrations.ray import merge as merge_by_ray

            nodes: dict[str, Any] = {
                "address": ray,
                "cpus": 1 if ray_cpus is None else ray_cpus,
                "gpus": ray_gpus or 0,
            }
            report = merge_by_ray(loaded, out, **nodes, **given, progress=not quiet, overwrite=overwrite)
        elif devices is not None:
            report = api.merge(loaded, out, device=device, devices=devices, part=share, **given, **how)
        else:
            planned = api.plan(loaded, device=device, **given)
            report = api.run(planned, out, part=share, **how)
        print_report(report, quiet=quiet, verbose=verbose)
        if finalize and not finalized(planned, out, report, quiet):
            raise SystemExit(OTHERS_ARE_MISSING)


def _part(text: str | None, finalize: bool, overwrite: bool) -> Part | None:
    """The part that --part names. Raises ArgumentError for what goes with none, or not with one."""
    if text is None:
        if finalize:
            raise ArgumentError("--finalize is of a part; add --part, or run pymerge finalize")
        return None
    if overwrite:
        raise ArgumentError("a part does not replace another merge; delete it first, and leave --overwrite out")
    from pymerge.planner.parts import parse_part

    return parse_part(text)
