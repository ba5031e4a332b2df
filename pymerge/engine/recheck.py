"""`pymerge verify --deep`: computes tensors of a finished output again, from its recipe and inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import bytes_of
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.config.merge_config import load_config
from pymerge.engine.executor import Executor
from pymerge.engine.measuring import measured, measuring
from pymerge.engine.run import processor, resolve_target
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context
from pymerge.errors import BackendError, CheckpointError, ConfigError, OutputError, PlanError
from pymerge.methods import get_method
from pymerge.output.files import MANIFEST_NAME
from pymerge.output.identity import differences
from pymerge.output.layout import ShardLayout, full_name
from pymerge.output.manifest import Checksum, checksum, read_manifest
from pymerge.output.shard import Task
from pymerge.planner.budget import budget
from pymerge.planner.build import build_plan
from pymerge.planner.jobs import FINISHED, batches, only
from pymerge.planner.plan import GIVEN_FILES, Plan
from pymerge.planner.steps import Step

if TYPE_CHECKING:
    from torch import Tensor

# What `pymerge verify` need not know: files and the division of the output into them are checked by its manifest.
_NOT_COMPARED = ("output files", GIVEN_FILES)


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
    if recipe.get("command"):
        raise OutputError(
            f"{out}: was made by pymerge {recipe['command']}, whose tensors are not computed again; verify it without "
            "--deep, which reads all of them"
        )
    plan = _plan(out, recipe)
    now = plan.identity(processor(plan))
    recorded = manifest["identity"]
    report = RecheckReport(
        changes=differences(
            {part: text for part, text in recorded.items() if part not in _NOT_COMPARED},
            {part: text for part, text in now.items() if part not in _NOT_COMPARED},
        )
    )
    written = {
        full_name(file, name): tensor
        for file, shard in manifest["shards"].items()
        for name, tensor in shard["tensors"].items()
    }
    _compare_plan(out, plan, manifest["base"]["parameters"], written, report)
    report.tensors += [steps[0].name for steps in sample(plan.steps, count) if steps[0].name in written]
    sink = _Checksums({name: checksum(manifest, written[name]["nbytes"]) for name in report.tensors})
    _compute(plan, sink, progress or NoProgress())
    for name in report.tensors:
        if sink.found[name].hexdigest() != written[name]["sha256"]:
            report.problems.append(f"{out}: tensor {name}: computed again it has other bytes; merge again")
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


def _plan(out: Path, recipe: dict[str, Any]) -> Plan:
    backend, device = recipe["backend"], recipe["device"]
    try:
        target = resolve_target(device, backend)
    except BackendError as error:
        raise OutputError(
            f"{out}: was merged on {device} with backend {backend}, which cannot be used here ({error}); verify it on "
            "such a machine, or without --deep"
        ) from error
    try:
        config = load_config(out / recipe["config"], directory=Path(recipe["directory"]))
        if get_method(config.merge_method).needs_data:
            raise OutputError(
                f"{out}: was merged by {config.merge_method}, whose models are not run over data again; verify it "
                "without --deep, which reads all of its tensors"
            )
        return build_plan(config, budget(target.device), target, dtype=recipe["dtype"])
    except (ConfigError, CheckpointError, PlanError) as error:
        raise OutputError(
            f"{out}: cannot be computed again, its recipe or inputs are gone or changed: {error}\n"
            f"put them back (they were named relative to {recipe['directory']}; the working directory is searched "
            "too), or verify without --deep"
        ) from error


def _compare_plan(out: Path, plan: Plan, base: int, written: dict[str, Any], report: RecheckReport) -> None:
    if plan.base_parameters != base:
        report.problems.append(f"{out}: the base had {base} parameters and has {plan.base_parameters}; merge again")
    planned = {full_name(layout.file, tensor.name): tensor for layout in plan.files for tensor in layout.tensors}
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


def _compute(plan: Plan, sink: _Checksums, progress: ProgressSink) -> None:
    """Have the executor compute the tensors of a sink again."""
    before = batches(measuring(plan.steps), plan.budget, threads=plan.target.threads)
    queue = batches(only(plan.steps, sink.found), plan.budget, {FINISHED}, plan.target.threads)
    progress.start(sum(job.step.bytes_of(job.piece) for batch in (*before, *queue) for job in batch.jobs if job.reads))
    try:
        with Tracer() as tracer, Reader(plan.inputs.stamps) as reader:
            runner = Runner(plan.target.backend, plan.target.device)
            context = Context(runner, reader, tracer, progress, plan.config.allow_nonfinite, plan.keeps_cache)
            known = measured(plan.steps, plan.budget, context, plan.target.threads)
            if known is not plan.steps:
                queue = batches(only(known, sink.found), plan.budget, {FINISHED}, plan.target.threads)
            Executor(context, sink, plan.target.threads).run(queue, plan.budget.tensors)
    finally:
        progress.close()


class _Checksums:
    """Sink that computes the checksums of tensors, each by its own of `found`."""

    def __init__(self, found: dict[str, Checksum]) -> None:
        self.found = found

    def take(self, tensor_name: str, data: Tensor | memoryview) -> Sequence[Task]:
        """Add the next bytes of a tensor."""
        self.found[tensor_name].update(data if isinstance(data, memoryview) else bytes_of(data.contiguous()))
        return ()

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; all of a merge's are planned."""
