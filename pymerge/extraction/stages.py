"""Stages of the work on an adapter, each kept in interim files as it goes: merged, measured, cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import Header, read_header
from pymerge.common.progress import ProgressSink
from pymerge.extraction.dense import merge, merge_and_cut, work_bytes
from pymerge.extraction.measure import Measured
from pymerge.extraction.parts import Portion, keep, kept
from pymerge.extraction.targets import TensorPair
from pymerge.extraction.work import WHOLE_NAME, Work
from pymerge.ops._op import one_thread
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_file

Stamps = dict[Path, tuple[int, int]]


@dataclass(frozen=True)
class Found:
    """All that was found: of each target, and merges that are whole, in files that have these stamps."""

    measured: tuple[Measured[TensorEntry], ...]
    experts: Mapping[str, TensorEntry]
    stamps: Stamps


def work_out(work: Work, output: OutputDirectory, progress: ProgressSink) -> Found:
    """Do what the interim files of an earlier run do not have."""
    plan, done = work.plan, output.finished
    parts, cuts = ([part for part in each if part.file not in done] for each in (work.parts, work.cuts))
    whole = [] if WHOLE_NAME in done else work.whole
    to_read = sum(target.bytes_read for part in parts for target in part.targets)
    names, cut_names = {each.name for each in whole}, {each.name for part in cuts for each in part.targets}
    progress.start(to_read + work_bytes(plan, names) + work_bytes(plan, cut_names))
    try:
        if whole:
            output.settle(layout_file(WHOLE_NAME, [(each.name, "F32", each.base.shape) for each in whole]))
            with Reader(plan.inputs.stamps) as reader:
                merge(plan, names, output, reader, progress)
        stamps = dict(plan.inputs.stamps)
        experts = _header(output, WHOLE_NAME, stamps).entries if work.whole else {}
        with Reader(stamps) as reader:
            _measure([part.of(experts) for part in parts], work, output, reader, progress)
            merge_and_cut(plan, cuts, work.options, reader, progress, lambda part, found: keep(part, found, output))
    finally:
        progress.close()
    headers = {part: _header(output, part.file, stamps) for part in (*work.parts, *work.cuts)}
    with Reader(stamps) as reader:
        measured = [each for part, header in headers.items() for each in kept(part.of(experts), header, reader)]
    return Found(tuple(measured), experts, stamps)


def _header(output: OutputDirectory, file: str, stamps: Stamps) -> Header:
    """The header of a finished interim file, whose stamp is added."""
    path = output.place_of(file)
    header = read_header(path)
    stamps[path] = header.file_bytes, header.mtime_ns
    return header


def _measure(
    parts: Sequence[Portion], work: Work, output: OutputDirectory, reader: Reader, progress: ProgressSink
) -> None:
    """Measure and keep part after part."""
    found: list[Measured[Tensor]] = []
    targets = [target for part in parts for target in part.targets]
    stream = _measured(targets, work, reader, progress, lambda: sum(each.nbytes for each in found))
    for part in parts:
        found += (next(stream) for _ in part.targets)
        keep(part, found, output)
        found.clear()
    stream.close()


def _measured(
    targets: Sequence[TensorPair], work: Work, reader: Reader, progress: ProgressSink, held: Callable[[], int]
) -> Generator[Measured[Tensor], None, None]:
    """All targets in their order, as many at a time as there are threads and memory beside what is `held`, each on one
    thread."""
    waiting: deque[tuple[TensorPair, Future[Measured[Tensor]]]] = deque()
    rest, plan = deque(targets), work.plan
    threads = max(1, plan.target.threads)
    keeps_cache, before = plan.keeps_cache, torch.get_num_threads()

    def one(target: TensorPair) -> Measured[Tensor]:
        with one_thread():
            found = work.measure(reader, target)
        if work.reads_all and not keeps_cache:
            reader.release(target.base)
            reader.release(target.expert)
        return found

    with ThreadPoolExecutor(threads, "pymerge-extract", torch.set_num_threads, (1,)) as pool:
        try:
            while rest or waiting:
                used = held() + sum(work.footprint(target) for target, _ in waiting)
                while rest and (
                    not waiting or (len(waiting) < 2 * threads and used + work.footprint(rest[0]) <= plan.budget.host)
                ):
                    target = rest.popleft()
                    if work.reads_all:
                        reader.announce(target.base)
                        reader.announce(target.expert)
                    waiting.append((target, pool.submit(one, target)))
                    used += work.footprint(target)
                target, future = waiting.popleft()
                progress.tensor(target.name)
                found = future.result()
                progress.advance(target.bytes_read)
                yield found
        finally:
            for _, future in waiting:
                future.cancel()
            torch.set_num_threads(before)  # what later threads start with
