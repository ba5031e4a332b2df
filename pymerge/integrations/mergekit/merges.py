"""Merges by mergekit's options: of a config, of a file, of a file of several. Needs no mergekit."""

from __future__ import annotations

import os
from pathlib import Path

from pymerge import api
from pymerge.config.document import Document, parse_yaml, read_text
from pymerge.config.merge_config import check_config
from pymerge.config.multi import read_stages
from pymerge.engine.report import MergeReport
from pymerge.engine.run import processor
from pymerge.integrations.mergekit.options import Options
from pymerge.output.manifest import read_manifest
from pymerge.planner.plan import Plan


def merge_document(document: Document, out: str | Path, options: Options, recipe: bytes) -> MergeReport:
    """Merge a config that is not checked yet.

    Args:
        out: folder; another merge of pymerge's in it is replaced, this very one verified.
        recipe: content of mergekit_config.yml.
    """
    planned = plan_document(document, options)
    with options.hub_cache():
        return _run(options.fit(planned, recipe), out, options)


def plan_document(document: Document, options: Options) -> Plan:
    """Plan the merge of a config that is not checked yet."""
    options.adjust(document)
    config = check_config(document)
    with options.hub_cache():
        return api.plan(config, device=options.where, max_shard_size=options.shard_bytes)


def merge_file(path: Path, out: str | Path, options: Options) -> MergeReport:
    """Merge a config file as mergekit-yaml does: names of models are relative to the working directory."""
    _set_threads(options)
    return merge_document(parse_yaml(read_text(path), str(path)), out, options, path.read_bytes())


def merge_stages(
    path: Path, out: str | None, intermediate: str, options: Options, *, lazy: bool = True
) -> list[MergeReport]:
    """Run the merges of a file that build on each other, as mergekit-multi does.

    Args:
        intermediate: folder of the outputs that have a name.
        lazy: finished merges are verified, and kept.
    """
    _set_threads(options)
    out_path = None if out is None else Path(out)
    stages = read_stages(path, out_path, Path(intermediate), adjust=options.adjust, beside_file=False)
    reports = []
    with options.hub_cache():
        plans = api.plan_stages(stages, device=options.where, max_shard_size=options.shard_bytes)
        for stage, planned in zip(stages, plans, strict=True):
            fitted = options.fit(api.settle_stage(stage, planned), stage.config.source_text.encode())
            reports.append(_run(fitted, stage.out, options, again=not lazy))
    return reports


def _run(plan: Plan, out: str | Path, options: Options, *, again: bool = False) -> MergeReport:
    """Carry out a plan in place of another merge that is there, as mergekit writes over it; `again` also this one."""
    manifest = read_manifest(Path(out))
    there = manifest is not None and manifest["identity"] == plan.identity(processor(plan))
    return api.run(plan, out, progress=not options.quiet, overwrite=again or not there)


def _set_threads(options: Options) -> None:
    """PyTorch reads this when it is imported, which a command has not done yet."""
    if options.num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.num_threads)
