"""A merge by the nodes of a Ray cluster: planned on one, a task for each file, published by who started it."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pymerge import env
from pymerge.common.events import event
from pymerge.common.progress import NoProgress, ProgressBar, ProgressSink
from pymerge.common.units import parse_bytes
from pymerge.config.merge_config import MergeConfig, load_config
from pymerge.engine.assignment import combined
from pymerge.engine.parts import conclude, nothing_done
from pymerge.engine.publishing import verified
from pymerge.engine.report import MergeReport
from pymerge.engine.run import check, whole_directory
from pymerge.errors import ArgumentError, PymergeError
from pymerge.integrations.ray import tasks
from pymerge.integrations.ray.cluster import PROCESS_BYTES, connected, memory_of_a_task
from pymerge.output.manifest import read_manifest
from pymerge.planner.build import DEFAULT_SHARD_BYTES
from pymerge.planner.parts import by_cost, few_files, file_costs
from pymerge.planner.plan import Plan

_RETRIES = 3  # of a task whose process or node is lost
_PATIENCE = 30.0  # seconds for tasks to end when the merge is stopped


def merge(
    config: str | Path | Mapping[str, Any] | MergeConfig,
    out: str | Path,
    *,
    address: str = "local",
    cpus: int = 1,
    gpus: int = 0,
    backend: str | None = None,
    memory: int | str | None = None,
    device_memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Merge checkpoints into the directory `out` by the nodes of a Ray cluster; the bytes are those of one process.

    All nodes, and the machine that this runs on, have the same paths of models and output: a file system that they
    share. Each output file is a task; a task whose process or node is lost runs again, at most three times.

    Args:
        config, out, max_shard_size, dtype, backend, overwrite, progress: as `pymerge.merge` takes them.
        address: "local" (a cluster of this machine alone, for as long as this takes), "auto" (the one that runs on this
            machine), or "HOST:PORT". A connection that this process has already is used.
        cpus: processors of each task, which are its threads, too.
        gpus: GPUs of each task, 0 or 1; with 1 the merge computes on CUDA.
        memory: of each task for tensors; default: what a node has, shared by as many tasks as it takes at once.
        device_memory: of each task on its GPU; default: what is free there.

    Raises:
        BackendError: there is no such cluster, or a node has another version of pymerge.
        PymergeError: another of its subclasses; of a task's, the message begins with the node. Finished files are kept.
    """
    if cpus < 1 or gpus not in (0, 1):
        raise ArgumentError(f"no task has {cpus} CPUs and {gpus} GPUs; give 1 CPU or more, and 0 or 1 GPU")
    loaded = config if isinstance(config, MergeConfig) else load_config(config)
    with connected(address):
        share = memory_of_a_task(cpus, gpus)
        held = parse_bytes(memory) if memory is not None else max(1 << 20, share - PROCESS_BYTES)
        options = {
            "device": "cuda" if gpus else "cpu",
            "backend": backend,
            "memory": held,
            "device_memory": device_memory,
            "max_shard_size": parse_bytes(max_shard_size),
            "dtype": dtype,
        }
        how = {"num_cpus": cpus, "num_gpus": gpus}
        sink = ProgressBar("merging") if progress else NoProgress()
        return _Merge(loaded, Path(out), options, how, share, sink).run(overwrite)


class _Merge:
    """One merge by tasks. `share` are the bytes of a task at most."""

    def __init__(
        self,
        config: MergeConfig,
        out: Path,
        options: dict[str, Any],
        how: dict[str, int],
        share: int,
        progress: ProgressSink,
    ) -> None:
        import ray

        self._ray = ray
        self._config = config
        self._out = out
        self._options = options
        self._how = how
        self._share = share
        self._progress = progress
        self._same = env.version(), os.getcwd()  # what all nodes have

    def run(self, overwrite: bool) -> MergeReport:
        """Plan, merge, publish."""
        started = time.perf_counter()
        planned = self._planned()
        plan: Plan = pickle.loads(planned.plan)
        nodes = sum(node["Alive"] for node in self._ray.nodes())
        if warning := few_files(plan, nodes):
            plan = replace(plan, warnings=(*plan.warnings, warning))
        check(plan, self._out)
        manifest = read_manifest(self._out)
        if manifest is not None and manifest["identity"] == planned.identity and not overwrite:
            return verified(plan, self._out, started, self._progress)
        with whole_directory(plan, self._out, planned.identity, overwrite=overwrite) as output:
            kept = len(output.finished)
            missing = output.missing
            output.share()
            reports = self._merged(plan, planned.plan, missing)
            output.reclaim()
            conclude(plan, output)
        whole = replace(nothing_done(plan, self._out, started), resumed_shards=kept)
        report = combined(reports, whole)
        event("finished", report.lines()[0], **asdict(report))
        return report

    def _planned(self) -> tasks.Planned:
        """The plan of a node, whose processor, versions and GPU are those of the merge."""
        given = pickle.dumps(self._config), self._options
        result, _ = self._ray.get(self._remote("plan_here", PROCESS_BYTES).remote(*self._same, *given))
        if isinstance(result, PymergeError):
            raise result
        assert isinstance(result, tasks.Planned)
        return result

    def _remote(self, name: str, memory: int) -> Any:
        """A function of `tasks` as one of Ray's, which says so itself where a node has no pymerge."""

        def call(*arguments: Any) -> Any:
            import importlib

            return getattr(importlib.import_module("pymerge.integrations.ray.tasks"), name)(*arguments)

        options = {"max_retries": _RETRIES, "scheduling_strategy": "SPREAD", "memory": min(memory, self._share)}
        return self._ray.remote(call).options(name=f"pymerge {name}", **options, **self._how)

    def _merged(self, plan: Plan, packed: bytes, missing: Collection[str]) -> list[MergeReport]:
        """Have tasks merge these files, the costliest first; their reports. The first error ends all."""
        costs = file_costs(plan.steps, plan.files)
        files = [file for file in by_cost(costs) if file in missing]
        steps = [step for step in plan.steps if step.file in missing]
        self._progress.start(sum(step.bytes_read + step.nbytes for step in steps))
        board = self._ray.remote(tasks.Board).options(num_cpus=0).remote()
        shipped = self._ray.put(packed)
        work = self._remote("merge_here", plan.peak_memory + PROCESS_BYTES)
        where = str(self._out.absolute())
        more = self._options["device"], self._options["memory"], board
        waiting = {work.remote(*self._same, shipped, where, file, *more): file for file in files}
        reports = []
        try:
            while waiting:
                done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=0.5)
                self._tell(board)
                for reference in done:
                    file = waiting.pop(reference)
                    reports.append(self._result(reference, file))
            self._tell(board)
        finally:
            self._stop(list(waiting))
            self._progress.close()
        return reports

    def _result(self, reference: Any, file: str) -> MergeReport:
        try:
            result, node = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise  # a mistake of ours: with its traceback
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().partition("\n")[0]
            raise PymergeError(
                f"{file}: lost {_RETRIES + 1} times ({type(error).__name__}: {reason}); the same command goes on where "
                "this one stopped"
            ) from error
        if isinstance(result, PymergeError):
            raise result
        assert isinstance(result, MergeReport)
        event("shard_finished", f"{file}: finished on node {node}", file=file, node=node, seconds=result.seconds)
        return result

    def _tell(self, board: Any) -> None:
        try:
            count, name = self._ray.get(board.take.remote(), timeout=5)
        except self._ray.exceptions.RayError:  # its node is lost: the work is not
            return
        self._progress.tensor(name)
        self._progress.advance(count)

    def _stop(self, waiting: list[Any]) -> None:
        """Cancel tasks, and wait until those that run have ended: then nobody writes any more."""
        for reference in waiting:
            self._ray.cancel(reference, force=False)
        if waiting:
            self._ray.wait(waiting, num_returns=len(waiting), timeout=_PATIENCE)
