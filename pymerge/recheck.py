"""`pymerge verify --deep`: computes tensors of a finished output again, from its recipe and inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from pymerge import engine, pieces
from pymerge.backends import Dispatcher
from pymerge.checkpoint import MANIFEST_NAME, TORCH_DTYPES, Reader, bytes_of, differences, read_manifest
from pymerge.config import load_config
from pymerge.errors import BackendError, CheckpointError, ConfigError, OutputError, PlanError
from pymerge.planner import Plan, Step, build_plan
from pymerge.progress import NoProgress, ProgressSink

# What `pymerge verify` need not know: the output's division into files is checked against its manifest.
_NOT_COMPARED = "output files"


@dataclass
class RecheckReport:
    """What was computed again: names of tensors, what is wrong, and what has changed since the merge."""

    tensors: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def recheck(out: Path | str, count: int | None = None, *, progress: ProgressSink | None = None) -> RecheckReport:
    """Compute tensors of a finished output again and compare their bytes with the checksums of its manifest.

    Args:
        out: directory of a finished merge. `verify` says whether its files agree with the manifest.
        count: how many tensors, of every kind of step in turn, always the same ones; None for all.
        progress: told about the bytes read.

    Raises:
        OutputError: no finished merge, the recipe or inputs are gone, or its device or backend cannot be used here.
    """
    out = Path(out)
    manifest = read_manifest(out)
    if manifest is None:
        raise OutputError(f"{out}: has no {MANIFEST_NAME} of a finished merge; run the merge to its end first")
    recipe = manifest["recipe"]
    plan = _plan(out, recipe)
    run_op = _dispatcher(out, recipe)
    now = plan.identity(recipe["backend"], recipe["device"], engine.processor(run_op.device))
    recorded = manifest["identity"]
    report = RecheckReport(
        changes=differences(
            {part: text for part, text in recorded.items() if part != _NOT_COMPARED},
            {part: text for part, text in now.items() if part != _NOT_COMPARED},
        )
    )
    written = {name: tensor for shard in manifest["shards"].values() for name, tensor in shard["tensors"].items()}
    _compare_plan(out, plan, manifest["base"]["parameters"], written, report)
    steps = [step for step in sample(plan.steps, count) if step.name in written]
    progress = progress or NoProgress()
    progress.start(sum(step.bytes_read for step in steps))
    try:
        with Reader(plan.inputs.stamps) as reader:
            for step in steps:
                progress.tensor(step.name)
                report.tensors.append(step.name)
                if _digest(step, reader, run_op) != written[step.name]["sha256"]:
                    report.problems.append(f"{out}: tensor {step.name}: computed again it has other bytes; merge again")
                progress.advance(step.bytes_read)
    finally:
        progress.close()
    return report


def sample(steps: Iterable[Step], count: int | None) -> list[Step]:
    """`count` steps (None: all), from each kind of action in turn, within a kind in the order of a hash of the name."""
    kinds: dict[str, list[Step]] = {}
    for step in sorted(steps, key=lambda step: hashlib.sha256(step.name.encode()).digest()):
        kinds.setdefault(step.action.label, []).append(step)
    rounds = zip_longest(*(kinds[label] for label in sorted(kinds)))
    return [step for step in chain.from_iterable(rounds) if step is not None][:count]


def _plan(out: Path, recipe: dict[str, Any]) -> Plan:
    try:
        config = load_config(out / recipe["config"], directory=Path(recipe["directory"]))
        return build_plan(config, dtype=recipe["dtype"])
    except (ConfigError, CheckpointError, PlanError) as error:
        raise OutputError(
            f"{out}: cannot be computed again, its recipe or inputs are gone or changed: {error}\n"
            f"put them back (they were named relative to {recipe['directory']}; the working directory is searched "
            "too), or verify without --deep"
        ) from error


def _dispatcher(out: Path, recipe: dict[str, Any]) -> Dispatcher:
    try:
        return Dispatcher(recipe["backend"], engine.resolve_device(recipe["device"]))
    except BackendError as error:
        raise OutputError(
            f"{out}: was merged on {recipe['device']} with backend {recipe['backend']}, which cannot be used here "
            f"({error}); verify it on such a machine, or without --deep"
        ) from error


def _compare_plan(out: Path, plan: Plan, base: int, written: dict[str, Any], report: RecheckReport) -> None:
    if plan.base_parameters != base:
        report.problems.append(f"{out}: the base had {base} parameters and has {plan.base_parameters}; merge again")
    planned = {step.name: step for step in plan.steps}
    for name in sorted(planned.keys() ^ written.keys()):
        where = "is not in the recipe's output" if name in written else "is lacking"
        report.problems.append(f"{out}: tensor {name}: {where}; merge again")
    for name in planned.keys() & written.keys():
        step, tensor = planned[name], written[name]
        if (step.dtype, list(step.shape)) != (tensor["dtype"], tensor["shape"]):
            report.problems.append(
                f"{out}: tensor {name}: is {tensor['dtype']} {tensor['shape']}, by the recipe {step.dtype} "
                f"{list(step.shape)}; merge again"
            )


def _digest(step: Step, reader: Reader, run_op: Dispatcher) -> str:
    """sha256 of one output tensor, computed piece after piece without anything that the engine does meanwhile."""
    digest = hashlib.sha256()
    for piece in step.pieces:
        rows = (piece.start, piece.stop) if step.base.shape else ()
        tensors = [reader.read(entry, *rows).to(run_op.device) for entry in step.inputs]
        base, experts = (tensors[0], tensors[1:]) if step.reads_base else (tensors[0], tensors)
        merged = pieces.run(step.action, step.layer, run_op, base, experts, TORCH_DTYPES[step.dtype])
        digest.update(bytes_of(merged.cpu().contiguous()))
    return digest.hexdigest()
