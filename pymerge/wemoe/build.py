"""Build a WEMoE directory from checkpoints on disk, in bounded memory: the plan of it, and carrying it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymerge import env
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import code_of
from pymerge.common.progress import NoProgress, ProgressBar, ProgressSink
from pymerge.common.units import format_bytes, parse_bytes
from pymerge.engine.report import MergeReport
from pymerge.engine.run import resolve_target, run
from pymerge.engine.trace import Tracer
from pymerge.errors import ConfigError, PlanError
from pymerge.methods.actions import copy
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import ShardLayout, layout_file
from pymerge.planner.advice import delta_warnings
from pymerge.planner.budget import Budget, budget
from pymerge.planner.build import DEFAULT_SHARD_BYTES, build_plan
from pymerge.planner.fit import fit
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step
from pymerge.planner.workers import worker_of
from pymerge.wemoe.config import expert_names, load_build_config
from pymerge.wemoe.find_mlps import empty_model, find_mlps
from pymerge.wemoe.router import make_router, router_count
from pymerge.wemoe.router_file import ROUTER_NAME, one_routers_tensors
from pymerge.wemoe.spec import SPEC_NAME, Spec, read_spec, spec_bytes
from pymerge.wemoe.task_vector_jobs import TaskVectorRun
from pymerge.wemoe.task_vector_layout import Parameter, TaskVectorFile, task_vector_files, weight_map
from pymerge.wemoe.task_vectors import INDEX_NAME, index_bytes

# Files of task vectors are held in memory where their sizes are not known before.
MOST_TASK_VECTOR_BYTES = 1_000_000_000
_NO_LIMIT = 2**62


@dataclass(frozen=True)
class BuildPlan:
    """All that a build will do: `static`, the plan of the plain checkpoint, and what lies beside it.

    It is the supplement (pymerge.engine.run.Supplement) of the static merge.
    """

    static: Plan
    spec: Spec  # without the stored size
    seed: int
    task_vectors: tuple[TaskVectorFile, ...]
    limit: int  # bytes of tensors

    @cached_property
    def router_layout(self) -> ShardLayout:
        """Layout of the routers' file."""
        described = []
        for index in range(router_count(self.spec)):
            with torch.device("meta"):
                router = make_router(self.spec, index, None)
            tensors = one_routers_tensors(self.spec, index, router).items()
            described += [(name, code_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors]
        return layout_file(ROUTER_NAME, described)

    @property
    def layouts(self) -> Sequence[ShardLayout]:
        return [self.router_layout, *(file.layout for file in self.task_vectors if file.exact)]

    @property
    def late(self) -> Mapping[str, int]:
        return {file.file: file.reserve for file in self.task_vectors if not file.exact}

    @property
    def changeable(self) -> Sequence[str]:
        return [ROUTER_NAME]

    @property
    def last(self) -> str:
        return SPEC_NAME

    @property
    def identity(self) -> Mapping[str, str]:
        files = [(file.file, [parameter.name for parameter in file.parameters]) for file in self.task_vectors]
        spec = self.spec.model_dump(mode="json", exclude_none=True)
        modules = json.dumps([spec.pop("modules"), files])
        parts = {f"wemoe {key}": json.dumps(value) for key, value in spec.items()}
        return parts | {"wemoe seed": str(self.seed), "wemoe modules": hashlib.sha256(modules.encode()).hexdigest()}

    @property
    def note(self) -> str:
        """Text for the model card."""
        kind = self.spec.storage.kind.replace("_", "-")
        return (
            f"{len(self.spec.modules)} of its MLPs mix {self.spec.tasks} experts for every input (WEMoE, arXiv "
            f"2402.00433; {kind} task vectors): load it with `pymerge.wemoe.load`, or as a plain model whose MLPs are "
            "the base's. "
        )

    @property
    def dense_bytes(self) -> int:
        """All task vectors, dense in the dtype of the storage."""
        return self.spec.storage.dense_bytes

    @property
    def stored_bytes(self) -> int:
        """All task vectors as they are stored, at most."""
        return sum(parameter.stored_bytes for file in self.task_vectors for parameter in file.parameters)

    def cost(self, finished: frozenset[str]) -> tuple[int, int]:
        """Bytes that are still to be read and written when these files are finished."""
        left = [p for file in self.task_vectors if file.file not in finished for p in file.parameters]
        routers = 0 if ROUTER_NAME in finished else sum(tensor.nbytes for tensor in self.router_layout.tensors)
        read = sum(entry.nbytes for parameter in left for entry in parameter.entries)
        return read, routers + sum(parameter.stored_bytes for parameter in left)

    def make(
        self, output: OutputDirectory, reader: Reader, tracer: Tracer, progress: ProgressSink, keeps_cache: bool
    ) -> None:
        """Write routers and task vectors, as far as they are not finished."""
        finished = output.finished
        if ROUTER_NAME not in finished:
            for index in range(router_count(self.spec)):
                router = make_router(self.spec, index, self.seed)
                for name, tensor in one_routers_tensors(self.spec, index, router).items():
                    progress.tensor(name)
                    output.write(name, tensor)
                    progress.advance(tensor.nbytes)
        left = [file for file in self.task_vectors if file.file not in finished]
        TaskVectorRun(left, self.limit, output, reader, tracer, progress, keeps_cache=keeps_cache).run()

    def files(self, beside: Sequence[ShardLayout]) -> dict[str, bytes]:
        """The index of the task vectors, and wemoe.json with the size that they have."""
        layouts = [layout for layout in beside if layout.file != ROUTER_NAME]
        stored = sum(tensor.nbytes for layout in layouts for tensor in layout.tensors)
        storage = self.spec.storage.model_copy(update={"stored_bytes": stored})
        return {
            INDEX_NAME: index_bytes(weight_map(layouts), stored),
            SPEC_NAME: spec_bytes(self.spec.model_copy(update={"storage": storage})),
        }

    def lines(self) -> list[str]:
        """Lines about all that is built beside the plain checkpoint, for people."""
        spec, storage = self.spec, self.spec.storage
        exactly = "" if self.task_vectors[0].exact else "at most "
        if storage.energy is not None:
            exactly = "at most (every rank full; energy decides) "
        read, written = self.cost(frozenset())
        routers = sum(tensor.nbytes for tensor in self.router_layout.tensors)
        shared = "one shared router" if spec.router.shared else f"{router_count(spec)} routers"
        return [
            f"WEMoE of {spec.tasks} experts: {', '.join(spec.experts)}",
            f"{len(spec.modules)} MLPs mixed per input, {spec.modules[0].path} to {spec.modules[-1].path}; {shared} of "
            f"depth {spec.router.depth}, {format_bytes(routers)}",
            f"task vectors: {storage.kind} {storage.dtype}, {exactly}{format_bytes(self.stored_bytes)} in "
            f"{len(self.task_vectors)} files; dense {format_bytes(self.dense_bytes)}",
            f"beside the plain checkpoint: read {format_bytes(read)}, write {format_bytes(written)}; held in memory "
            f"at once: at most {format_bytes(max(file.peak[0] for file in self.task_vectors))}",
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
            f"{len(self.spec.modules)} MLPs mix {self.spec.tasks} experts; task vectors: {storage.kind}, "
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
    endless = replace(allowed, host=_NO_LIMIT, tensors=_NO_LIMIT)
    plan = build_plan(merge, endless, target, max_shard_bytes=most, dtype=dtype)
    base = plan.inputs.donor
    experts = [expert for expert in plan.inputs.experts if expert.path != base.path]
    if len(experts) != len(names):
        raise ConfigError(f"{merge.name}: models lists the base as an expert; leave it out")
    model = empty_model(base, section.architecture) if model is None else model
    modules = find_mlps(base, model, section.modules)
    parameters = [
        Parameter(name, tuple(shape), base.tensors[name], _entries(experts, name), section.storage)
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
    static = _fitted(plan, {parameter.name for parameter in parameters}, files, allowed)
    static = replace(static, warnings=(*static.warnings, *delta_warnings(static)))
    return BuildPlan(static, spec, section.seed, files, allowed.host)


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
        supplement=planned,
        overwrite=overwrite,
        progress=ProgressBar("building") if progress else NoProgress(),
    )
    return BuildReport(report, read_spec(out))


def _entries(experts: Sequence[Checkpoint], name: str) -> tuple[TensorEntry, ...]:
    return tuple(expert.tensors[name] for expert in experts)


def _kept(step: Step, plan: Plan) -> Step:
    """The step with the base's tensor as its result."""
    copied = replace(step, action=copy(), experts=(), reads_base=True, group=None)
    return replace(copied, worker=worker_of(copied, plan.target, allow_nonfinite=plan.config.allow_nonfinite))


def _fitted(plan: Plan, kept: set[str], files: Sequence[TaskVectorFile], allowed: Budget) -> Plan:
    """The plan with the base's tensors for all that is `kept`, within the limit.

    Raises PlanError, which names the least memory with which both the static merge and the task vectors can be made.
    """
    steps = [_kept(step, plan) if step.name in kept else step for step in plan.steps]
    needed, worst = max((file.peak for file in files), key=lambda peak: peak[0])
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
    return replace(plan, steps=fit(steps, allowed), budget=allowed)
