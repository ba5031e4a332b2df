"""The Python interface to merges of files: `plan`, `run`, `merge`, `finalize`, `multi`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import env
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.common.progress import NoProgress, ProgressBar
from pymerge.common.units import parse_bytes
from pymerge.config.merge_config import MergeConfig, load_config
from pymerge.engine.report import MergeReport
from pymerge.engine.run import resolve_target
from pymerge.engine.run import run as carry_out
from pymerge.errors import ArgumentError, PlanError
from pymerge.grams.merges import seen_weights, with_grams
from pymerge.planner.advice import delta_warnings
from pymerge.planner.budget import HOST_SHARE, available_bytes, budget
from pymerge.planner.build import DEFAULT_SHARD_BYTES, build_plan
from pymerge.planner.parts import Part, checked_part, few_files
from pymerge.planner.plan import Plan

if TYPE_CHECKING:
    import torch

    from pymerge.config.multi import Stage


def plan(
    config: str | Path | Mapping[str, Any] | MergeConfig,
    *,
    device: str | torch.device = "auto",
    backend: str | None = None,
    memory: int | str | None = None,
    device_memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
) -> Plan:
    """Plan a merge from headers; nothing is written. `run` carries the plan out, as often as one likes.

    A few rows are read where a method has advice on the size of the deltas (wudi with a fixed lr).

    Args:
        config: path of a YAML file, YAML text, or a mapping of the same form.
        device: where the merge will compute: "cpu", "cuda", "cuda:N", or "auto": CUDA where there is one and the method
            gains by it. Its memory decides the sizes of the pieces.
        backend: "auto", "reference", "native", "triton" or "cuda"; default: PYMERGE_BACKEND, or "auto".
        memory: limit for the tensors held at once, in bytes or as "8GiB"; default: three quarters of the memory that
            is available to this process. On CUDA it limits the pinned buffers.
        device_memory: limit for what the merge takes of a CUDA device, whose tensors get four fifths of it; default:
            what is free there.
        max_shard_size: size above which a new output file is started.
        dtype: output dtype ("bfloat16", ...), instead of the config's.

    Raises:
        ConfigError, PlanError, CheckpointError: with everything that is wrong.
        BackendError: the device or the backend cannot be used here.
    """
    read = config if isinstance(config, MergeConfig) else load_config(config)
    methods = {read.merge_method} if device_memory is None else ()  # which is said of a GPU alone
    target = resolve_target(device, backend or env.default_backend(), methods)
    limit, most = budget(target.device, _bytes(memory), _bytes(device_memory)), parse_bytes(max_shard_size)
    planned = build_plan(read, limit, target, max_shard_bytes=most, dtype=dtype, network=seen_weights)
    return replace(planned, warnings=(*planned.warnings, *delta_warnings(planned)))


def _bytes(limit: int | str | None) -> int | None:
    return None if limit is None else parse_bytes(limit)


def run(
    plan: Plan,
    out: str | Path,
    *,
    progress: bool = True,
    overwrite: bool = False,
    profile: str | Path | None = None,
    part: Part | None = None,
) -> MergeReport:
    """Carry out a plan: merge checkpoints on disk into the directory `out`.

    Args:
        plan: from `plan`, with its device, backend and budget; it may be carried out several times.
        out: new or empty directory, or one that holds this very merge, finished (it is verified) or not (it goes on).
        progress: show a progress bar on standard error.
        overwrite: replace another merge in `out`.
        profile: file for a trace of every read, copy, computation and write, in Chrome's trace event format.
        part: (2, 3) merges the second of three parts, whole files, beside other processes and machines that have the
            same `out`; `finalize` makes a model of them. A merge without `part` goes on with what parts have made, and
            they with what it has.

    Raises:
        CheckpointError: an input has changed since the plan was made, among others.
        PymergeError: another of its subclasses, see pymerge.errors. The output is then absent, or marked unfinished.
    """
    sink = ProgressBar("merging") if progress else NoProgress()
    trace = None if profile is None else Path(profile)
    if part is None:
        more: dict[str, Any] = {"collected": with_grams(shown=progress)} if plan.method.needs_data else {}
        return carry_out(plan, Path(out), overwrite=overwrite, progress=sink, profile=trace, **more)
    from pymerge.engine.parts import run_part

    if overwrite:
        raise ArgumentError("a part does not replace another merge, which other parts may be writing; delete it first")
    return run_part(_advised(plan, part), Path(out), part, progress=sink, profile=trace)


def finalize(
    config: str | Path | Mapping[str, Any] | MergeConfig | Plan,
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    backend: str | None = None,
    memory: int | str | None = None,
    device_memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    verify: bool | None = None,
    progress: bool = True,
) -> MergeReport:
    """Make a model of what the parts of a merge have left in the directory `out`; the bytes are those of one merge.

    Args:
        config: that of the parts, or their plan.
        out: their directory.
        device, backend, memory, device_memory, max_shard_size, dtype: of `plan`, as the parts had them.
        verify: read all files again and compare their checksums; default: where several machines have written them.
        progress: show a progress bar where an output that was published already is verified.

    Raises:
        OutputError: parts are missing, which are listed, or are still being written.
        PymergeError: another of its subclasses, see pymerge.errors.
    """
    from pymerge.engine import parts

    if isinstance(config, Plan):
        planned = config
    else:
        where: dict[str, Any] = {"device": device, "memory": memory, "device_memory": device_memory}
        planned = plan(config, backend=backend, max_shard_size=max_shard_size, dtype=dtype, **where)
    sink = ProgressBar("verifying") if progress else NoProgress()
    return parts.finalize(planned, Path(out), verify=verify, progress=sink)


def _advised(plan: Plan, part: Part) -> Plan:
    """The plan, with a warning where it has few files for so many parts."""
    warning = few_files(plan, checked_part(part)[1])
    return replace(plan, warnings=(*plan.warnings, warning)) if warning else plan


def merge(
    config: str | Path | Mapping[str, Any] | MergeConfig,
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    backend: str | None = None,
    memory: int | str | None = None,
    device_memory: int | str | None = None,
    progress: bool = True,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    overwrite: bool = False,
    profile: str | Path | None = None,
    part: Part | None = None,
    devices: str | None = None,
) -> MergeReport:
    """Merge checkpoints on disk into the directory `out`: `plan` and `run` in one, with their arguments.

    Args:
        devices: "cuda:0,cuda:1", or "all": a process on each of these devices shares the work, with `memory` (default:
            an equal share) and `device_memory` for each; in place of `device`.

    Raises:
        PymergeError: one of its subclasses, see pymerge.errors. The output is then absent, or marked unfinished.
    """
    if part is not None:
        checked_part(part)
    options: dict[str, Any] = {
        "backend": backend,
        "device_memory": device_memory,
        "max_shard_size": max_shard_size,
        "dtype": dtype,
    }
    if devices is not None:
        if part is not None or profile is not None or str(device) != "auto":
            raise ArgumentError("devices are for a whole merge, without a trace; leave device, part and profile out")
        return _run_on(devices, config, Path(out), progress, overwrite, memory, **options)
    planned = plan(config, device=device, memory=memory, **options)
    return run(planned, out, progress=progress, overwrite=overwrite, profile=profile, part=part)


def _run_on(
    devices: str,
    config: str | Path | Mapping[str, Any] | MergeConfig,
    out: Path,
    progress: bool,
    overwrite: bool,
    memory: int | str | None,
    **options: Any,
) -> MergeReport:
    """Merge by a process on each device."""
    from pymerge.common.devices import resolve_devices
    from pymerge.engine.processes import run_on

    names = resolve_devices(devices)
    each = int(HOST_SHARE * available_bytes()) // len(names) if memory is None else parse_bytes(memory)
    planned = plan(config, device=names[0], memory=each, **options)
    if warning := few_files(planned, len(names)):
        planned = replace(planned, warnings=(*planned.warnings, warning))
    sink = ProgressBar("merging") if progress else NoProgress()
    return run_on(planned, out, names, memory=each, overwrite=overwrite, progress=sink)


def plan_stages(
    stages: list[Stage],
    *,
    device: str | torch.device = "auto",
    backend: str | None = None,
    memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
) -> list[Plan]:
    """Plan all stages before any has run: later ones from what earlier ones will write.

    Raises:
        PlanError, CheckpointError: of the first stage that cannot be done; the message begins with its name.
    """
    methods = {stage.config.merge_method for stage in stages}
    target = resolve_target(device, backend or env.default_backend(), methods)
    limit = budget(target.device, _bytes(memory))
    planned: dict[str, Checkpoint] = {}
    plans = []
    for stage in stages:
        try:
            if stage.config.output == "adapter":
                place = stage.config.place("output")
                raise PlanError(
                    [f"{place}: a stage of several writes a model; merge adapters by a config of their own"]
                )
            plan = build_plan(stage.config, limit, target, max_shard_bytes=parse_bytes(max_shard_size), planned=planned)
        except PlanError as error:
            raise PlanError(f"stage {stage.name or 'without name'}: {problem}" for problem in error.problems) from error
        planned[str(stage.out)] = plan.checkpoint(stage.out)
        plans.append(plan)
    return plans


def settle_stage(stage: Stage, planned: Plan) -> Plan:
    """The plan of a stage whose turn has come: what earlier stages were to write is there."""
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    settled = planned.settled()
    return replace(settled, warnings=(*settled.warnings, *delta_warnings(settled)))


def multi(
    config: str | Path,
    out: str | Path | None = None,
    *,
    intermediate_dir: str | Path | None = None,
    device: str | torch.device = "auto",
    backend: str | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> list[MergeReport]:
    """Run several merges that build on each other, as mergekit-multi does.

    All are planned before the first runs. A stage that is finished is verified, one that was interrupted goes on.

    Args:
        config: path of a file of YAML documents, or their text: merge configs, all but one with a `name`, by which
            others can use their outputs as models.
        out: folder of the document without name; None if all have one.
        intermediate_dir: every named document is merged into its folder in there; default: `out` with ".stages" behind.
        device, backend, memory, progress, max_shard_size, overwrite: of every merge, as in `pymerge.merge`.

    Returns:
        The reports, in the order in which the stages ran.

    Raises:
        PymergeError: one of its subclasses; what is finished by then is kept.
    """
    from pymerge.config.multi import read_stages

    stages = read_stages(
        config, None if out is None else Path(out), None if intermediate_dir is None else Path(intermediate_dir)
    )
    plans = plan_stages(stages, device=device, backend=backend, memory=memory, max_shard_size=max_shard_size)
    reports = []
    for stage, planned in zip(stages, plans, strict=True):
        reports.append(run(settle_stage(stage, planned), stage.out, progress=progress, overwrite=overwrite))
    return reports
