"""`pymerge verify --deep`: computes tensors of a finished output again, from its recipe and inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.devices import resolve_device
from pymerge.common.dtypes import bytes_of, upcast
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.config.merge_config import load_config
from pymerge.engine.passes import Passes
from pymerge.engine.run import processor
from pymerge.errors import BackendError, CheckpointError, ConfigError, OutputError, PlanError
from pymerge.output.files import MANIFEST_NAME
from pymerge.output.identity import differences
from pymerge.output.manifest import read_manifest
from pymerge.planner.budget import Budget, budget
from pymerge.planner.build import build_plan
from pymerge.planner.jobs import slots
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

# What `pymerge verify` need not know: the output's division into files is checked against its manifest.
_NOT_COMPARED = "output files"


@dataclass
class RecheckReport:
    """Names of tensors that were computed again, what is wrong with them, and what has changed since the merge."""

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
    if any(shard.get("beside", False) for shard in manifest["shards"].values()):
        raise OutputError(
            f"{out}: is a WEMoE directory, whose tensors are not computed again; verify it without --deep, which reads "
            "all of them"
        )
    recipe = manifest["recipe"]
    run_op = _dispatcher(out, recipe)
    plan = _plan(out, recipe, budget(run_op.device))
    computing = processor(plan, resolve_device(recipe["device"]), recipe["backend"])
    now = plan.identity(recipe["backend"], recipe["device"], computing)
    recorded = manifest["identity"]
    report = RecheckReport(
        changes=differences(
            {part: text for part, text in recorded.items() if part != _NOT_COMPARED},
            {part: text for part, text in now.items() if part != _NOT_COMPARED},
        )
    )
    written = {name: tensor for shard in manifest["shards"].values() for name, tensor in shard["tensors"].items()}
    _compare_plan(out, plan, manifest["base"]["parameters"], written, report)
    tensors = [steps for steps in sample(plan.steps, count) if steps[0].name in written]
    progress = progress or NoProgress()
    progress.start(sum(step.bytes_read for steps in tensors for step in steps))
    try:
        with Reader(plan.inputs.stamps) as reader:
            for steps in tensors:
                name = steps[0].name
                progress.tensor(name)
                report.tensors.append(name)
                if _digest(steps, reader, run_op) != written[name]["sha256"]:
                    report.problems.append(f"{out}: tensor {name}: computed again it has other bytes; merge again")
                progress.advance(sum(step.bytes_read for step in steps))
    finally:
        progress.close()
    return report


def sample(steps: Iterable[Step], count: int | None) -> list[list[Step]]:
    """`count` tensors (None: all) with all their steps, from each kind of action in turn, within a kind in the order of
    a hash of the name."""
    tensors: dict[str, list[Step]] = {}
    for step in steps:
        tensors.setdefault(step.name, []).append(step)
    kinds: dict[str, list[list[Step]]] = {}
    for name in sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest()):
        kinds.setdefault(tensors[name][0].action.label, []).append(tensors[name])
    rounds = zip_longest(*(kinds[label] for label in sorted(kinds)))
    return [tensor for tensor in chain.from_iterable(rounds) if tensor is not None][:count]


def _plan(out: Path, recipe: dict[str, Any], budget: Budget) -> Plan:
    try:
        config = load_config(out / recipe["config"], directory=Path(recipe["directory"]))
        return build_plan(config, budget, dtype=recipe["dtype"])
    except (ConfigError, CheckpointError, PlanError) as error:
        raise OutputError(
            f"{out}: cannot be computed again, its recipe or inputs are gone or changed: {error}\n"
            f"put them back (they were named relative to {recipe['directory']}; the working directory is searched "
            "too), or verify without --deep"
        ) from error


def _dispatcher(out: Path, recipe: dict[str, Any]) -> Runner:
    try:
        return Runner(recipe["backend"], resolve_device(recipe["device"]))
    except BackendError as error:
        raise OutputError(
            f"{out}: was merged on {recipe['device']} with backend {recipe['backend']}, which cannot be used here "
            f"({error}); verify it on such a machine, or without --deep"
        ) from error


def _compare_plan(out: Path, plan: Plan, base: int, written: dict[str, Any], report: RecheckReport) -> None:
    if plan.base_parameters != base:
        report.problems.append(f"{out}: the base had {base} parameters and has {plan.base_parameters}; merge again")
    planned = {tensor.name: tensor for layout in plan.layouts for tensor in layout.tensors}
    for name in sorted(planned.keys() ^ written.keys()):
        where = "is not in the recipe's output" if name in written else "is lacking"
        report.problems.append(f"{out}: tensor {name}: {where}; merge again")
    for name in planned.keys() & written.keys():
        expected, tensor = planned[name], written[name]
        if (expected.dtype, list(expected.shape)) != (tensor["dtype"], tensor["shape"]):
            report.problems.append(
                f"{out}: tensor {name}: is {tensor['dtype']} {tensor['shape']}, by the recipe {expected.dtype} "
                f"{list(expected.shape)}; merge again"
            )


def _digest(steps: Sequence[Step], reader: Reader, run_op: Runner) -> str:
    """sha256 of one output tensor, computed piece after piece without anything that the engine does meanwhile."""
    digest = hashlib.sha256()
    passes = Passes(run_op)
    for slot in slots(steps):
        step, piece = slot.step, slot.piece
        rows = (piece.start, piece.stop) if step.base.shape else ()
        tensors = [upcast(reader.read(entry, *rows)).to(run_op.device) for entry in step.inputs]
        base, experts = (tensors[0], tensors[1:]) if step.reads_base else (tensors[0], tensors)
        merged = passes.run(slot, base, experts)
        if merged is not None:
            digest.update(bytes_of(merged.cpu().contiguous()))
    return digest.hexdigest()
