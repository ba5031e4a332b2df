"""Build a WEMoE directory from checkpoints on disk, in bounded memory: the plan of it, and carrying it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import env
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.common.progress import NoProgress, ProgressBar
from pymerge.common.units import format_bytes, parse_bytes
from pymerge.engine.report import MergeReport
from pymerge.engine.run import resolve_target, run
from pymerge.errors import ConfigError, PlanError
from pymerge.methods.actions import copy
from pymerge.planner.advice import delta_warnings
from pymerge.planner.budget import Budget, budget
from pymerge.planner.build import DEFAULT_SHARD_BYTES, draft_plan
from pymerge.planner.extras import Extras
from pymerge.planner.fit import fit
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step
from pymerge.planner.window import forecast
from pymerge.planner.workers import worker_of
from pymerge.wemoe.config import expert_names, load_build_config
from pymerge.wemoe.extras import make_extras
from pymerge.wemoe.find_mlps import empty_model, find_mlps
from pymerge.wemoe.router import router_count
from pymerge.wemoe.spec import Spec, read_spec
from pymerge.wemoe.task_vector_layout import StoredParameter, TaskVectorFile, task_vector_files

if TYPE_CHECKING:
    import torch
    from torch import nn

# Files of task vectors are held in memory where their sizes are not known before.
MOST_TASK_VECTOR_BYTES = 1_000_000_000


@dataclass(frozen=True)
class BuildPlan:
    """Plan of a build: `static` is that of the plain checkpoint, its extras are all that lies beside it."""

    static: Plan
    spec: Spec  # without the stored size
    task_vectors: tuple[TaskVectorFile, ...]

    @property
    def dense_bytes(self) -> int:
        """All task vectors, dense in the dtype of the storage."""
        return self.spec.storage.dense_bytes

    @property
    def stored_bytes(self) -> int:
        """All task vectors as they are stored, at most."""
        return sum(parameter.stored_bytes for file in self.task_vectors for parameter in file.parameters)

    @property
    def peak_memory(self) -> int:
        """Upper bound in bytes of all tensors held at once while files beside the plain checkpoint are made."""
        budget = self.static.budget
        queue = batches(self.static.extras.steps, budget)
        return forecast(queue, budget.host, self.static.target.threads).peak

    def lines(self) -> list[str]:
        """Lines about all that is built beside the plain checkpoint, for people."""
        spec, storage, extras = self.spec, self.spec.storage, self.static.extras
        exactly = "" if self.task_vectors[0].exact else "at most "
        if storage.energy is not None:
            exactly = "at most (every rank full; energy decides) "
        routers = extras.bytes_written - self.stored_bytes
        shared = "one shared router" if spec.router.shared else f"{router_count(spec)} routers"
        return [
            f"WEMoE of {spec.tasks} experts: {', '.join(spec.experts)}",
            f"{len(spec.modules)} modules mixed per input, {spec.modules[0].path} to {spec.modules[-1].path}; {shared} "
            f"of depth {spec.router.depth}, {format_bytes(routers)}",
            f"task vectors: {storage.kind} {storage.dtype}, {exactly}{format_bytes(self.stored_bytes)} in "
            f"{len(self.task_vectors)} files; dense {format_bytes(self.dense_bytes)}",
            f"beside the plain checkpoint: read {format_bytes(extras.bytes_read)}, write "
            f"{format_bytes(extras.bytes_written)}; held in memory at once: at most {format_bytes(self.peak_memory)}",
        ]


@dataclass(frozen=True)
class BuildReport:
    """Result of `build`: what the whole build did, and what it has built."""

    merge: MergeReport
    spec: Spec

    def lines(self) -> list[str]:
        """The summary, for people."""
        storage = self.spec.storage
        return [
            *self.merge.lines(),
            f"{len(self.spec.modules)} modules mix {self.spec.tasks} experts; task vectors: {storage.kind}, "
            f"{format_bytes(storage.stored_bytes)} (dense {format_bytes(storage.dense_bytes)})",
        ]


def plan_build(
    config: str | Path | Mapping[str, Any],
    *,
    device: str | torch.device = "auto",
    backend: str | None = None,
    memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    model: nn.Module | None = None,
) -> BuildPlan:
    """Plan a build from headers; nothing is written. Arguments and errors as of `build`."""
    target = resolve_target(device, backend or env.default_backend())
    merge, section = load_build_config(config)
    allowed = budget(target.device, None if memory is None else parse_bytes(memory))
    most = parse_bytes(max_shard_size)
    names = expert_names(merge)
    plan = draft_plan(merge, allowed, target, max_shard_bytes=most, dtype=dtype)
    base = plan.inputs.donor
    experts = [expert for expert in plan.inputs.experts if expert.path != base.path]
    if len(experts) != len(names):
        raise ConfigError(f"{merge.name}: models lists the base as an expert; leave it out")
    model = empty_model(base, section.architecture) if model is None else model
    modules = find_mlps(base, model, section.modules)
    parameters = [
        StoredParameter(name, tuple(shape), base.tensors[name], _entries(experts, name), section.storage)
        for module in modules
        for name, shape in module.parameters.items()
    ]
    dense = sum(parameter.dense_bytes for parameter in parameters)
    spec = Spec(
        architecture=type(model).__name__,
        experts=names,
        init_lambda=section.init_lambda,
        reduce=section.reduce,
        router=section.router,
        storage=section.storage.model_copy(update={"dense_bytes": dense}),
        modules=modules,
    )
    files = tuple(task_vector_files(parameters, min(most, MOST_TASK_VECTOR_BYTES)))
    extras = make_extras(spec, section.seed, files)
    steps = _with_base(plan, parameters)
    _check_memory(steps, files, extras, allowed)
    static = replace(plan, steps=fit(steps, allowed), extras=extras)
    static = replace(static, warnings=(*static.warnings, *delta_warnings(static)))
    return BuildPlan(static, spec, files)


def build(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    backend: str | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    overwrite: bool = False,
    model: nn.Module | None = None,
) -> BuildReport:
    """Build a WEMoE directory from a base and its experts on disk; its tensors are those of `upscale`.

    Args:
        config: path of a YAML file, YAML text, or a mapping: a merge config with a section `wemoe`, see docs/wemoe.md.
        out: new or empty directory, or one that holds this very build, finished (it is verified) or not (it goes on).
        device, backend: of the static merge, as in `pymerge.merge`; task vectors are made on the CPU.
        memory: limit for the tensors held at once, in bytes or as "8GiB"; default: as in `pymerge.merge`.
        progress: show a progress bar on standard error.
        max_shard_size: size above which a new file is started; files of task vectors have at most 1 GB.
        dtype: of the plain checkpoint, instead of the config's; task vectors have that of their storage.
        overwrite: replace another output in `out`.
        model: an instance of an architecture that transformers does not have, with or without weights.

    Raises:
        PymergeError: one of its subclasses, see pymerge.errors. The output is then absent, or marked unfinished.

    Source: WEMoE, arXiv 2402.00433; E-WEMoE, arXiv 2410.21804.
    """
    planned = plan_build(
        config, device=device, backend=backend, memory=memory, max_shard_size=max_shard_size, dtype=dtype, model=model
    )
    out = Path(out)
    report = run(
        planned.static,
        out,
        overwrite=overwrite,
        progress=ProgressBar("building") if progress else NoProgress(),
    )
    return BuildReport(report, read_spec(out))


def _entries(experts: Sequence[Checkpoint], name: str) -> tuple[TensorEntry, ...]:
    return tuple(expert.tensors[name] for expert in experts)


def _with_base(plan: Plan, parameters: Sequence[StoredParameter]) -> list[Step]:
    """The steps of the static merge, with the base's tensor as the result for each of the parameters that are mixed."""
    mixed = {parameter.name for parameter in parameters}
    found = []
    for step in plan.steps:
        if step.name in mixed:
            copied = replace(step, action=copy(), experts=(), reads_base=True, group=None)
            worker = worker_of(copied, plan.target)
            found.append(replace(copied, worker=worker))
        else:
            found.append(step)
    return found


def _check_memory(steps: Sequence[Step], files: Sequence[TaskVectorFile], extras: Extras, allowed: Budget) -> None:
    """Raise PlanError unless all task vectors can be made within the limit.

    The error names the least memory with which both they and the static merge, of these steps, can be made.
    """
    peaks = [(step.footprint(step.pieces[0]).peak, step) for step in extras.steps if step.experts]
    needed, worst = max(peaks, key=lambda peak: peak[0])
    static = max((step.footprint(step.smallest).peak for step in steps), default=0) if allowed.device == "cpu" else 0
    if needed > allowed.host:
        file = "" if files[0].exact else " and the file that they are written to"
        smaller = "" if files[0].exact else ", or a smaller --max-shard-size"
        raise PlanError(
            [
                f"memory: the task vectors of {worst.name!r} {list(worst.shape)} of {len(worst.experts)} "
                f"experts{file} hold {format_bytes(needed, round_up=True)} of tensors at once, the limit is "
                f"{format_bytes(allowed.host)} ({allowed.origin}); give --memory "
                f"{format_bytes(max(needed, static), round_up=True)} or more{smaller}"
            ]
        )
