"""Carrying out `pymerge collect`: runs a model over data, and writes the Gram of each linear weight's inputs."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymerge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pymerge.checkpoint.hub import fetch
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import read_header
from pymerge.common.devices import resolve_device
from pymerge.common.events import event
from pymerge.common.files import size_and_digest
from pymerge.common.libraries import require
from pymerge.common.names import checked_pattern, listed
from pymerge.common.progress import CountBar
from pymerge.config.references import hub_reference, model_path
from pymerge.errors import ArgumentError, CheckpointError, NonFiniteError, OutputError
from pymerge.grams.data import Batch, batches, read_samples
from pymerge.grams.model import Linears, Opened, Weights, linears_of, load_whole, open_model, refuse_fused, run_on
from pymerge.grams.sums import Sums, join, keep, kept, tensors_of
from pymerge.grams.turns import Passage, VisitedTwiceError, run_by_blocks
from pymerge.grams.work import clear, work_folder

FORM = "mean of x x^T over the inputs x of each linear weight, [d_in, d_in], by the weight's name"
_STATE, _OUTSIDE = "whole.safetensors", "outside.safetensors"
_SECONDS = 30.0  # between two writes of all sums, where the whole model runs at once


@dataclass(frozen=True)
class Settings:
    """Settings that the numbers of a collection depend on, beside model and data."""

    samples: int
    max_tokens: int | None
    length: int
    batch: int
    dtype: str
    exclude: tuple[str, ...]


@dataclass(frozen=True)
class Collected:
    """Result of a collection: Grams, rows that most are means of, linear weights without, and how it was done."""

    out: Path
    grams: int
    tokens: int
    without: tuple[str, ...]
    by_blocks: bool
    found_there: bool = False


def collect(
    model: str,
    data: Path,
    out: Path,
    settings: Settings,
    *,
    device: str = "auto",
    progress: bool = True,
) -> Collected:
    """Write the Grams of a model's inputs on data into the safetensors file `out`.

    What is done is kept in a folder beside it until the file is whole: called again, it goes on there.

    Raises:
        ArgumentError: a library is missing, settings do not fit, leave no weight, or experts are in one tensor.
        CheckpointError: the model or data cannot be read.
        OutputError: `out` exists and is another collection's, or cannot be written.
    """
    require("collect")
    for pattern in settings.exclude:
        checked_pattern(pattern, "--exclude ")
    folder, checkpoint = _open(model)
    samples = read_samples(data, settings.samples)
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise OutputError(f"{out}: is no name of a .safetensors file in a folder that exists; give one")
    metadata = {
        "format": "pymerge grams 1",
        "form": FORM,
        "model": checkpoint.origin or str(checkpoint.path.resolve()),
        "model_sha256": _digest(checkpoint),
        "data_sha256": samples.digest,
        "settings": json.dumps(asdict(settings)),
        "dtype": settings.dtype,
        "samples": str(len(samples)),
    }
    if out.exists():
        return _there(out, metadata)
    opened = open_model(folder, checkpoint)
    refuse_fused(folder, opened, settings.exclude)
    inputs = batches(samples, opened.model, folder, settings.length, settings.batch, settings.max_tokens)
    where = torch.device(str(resolve_device(device)))
    work = out.with_name(f".{out.stem}.collecting")
    with work_folder(work, metadata):
        run = _Collection(folder, checkpoint, opened, inputs, settings, where, work)
        parts, linears, by_blocks = run.carry_out(progress)
        counts: dict[str, int] = {}
        for part in parts:
            found = kept(part)
            assert found is not None
            counts |= found.counts
        counts = {name: count for name, count in counts.items() if count}
        if not counts:
            clear(work)
            raise ArgumentError(
                f"{folder}: none of {listed(sorted(linears.layers.values()))} has inputs on {data}; give data that the "
                "part of the model takes that they are in, or exclude less"
            )
        tokens = max(counts.values())
        odd = {name: count for name, count in sorted(counts.items()) if count != tokens}
        without = tuple(sorted({*linears.without, *(set(linears.layers.values()) - set(counts))}))
        metadata |= {"tokens": str(tokens), "rows": json.dumps(odd), "without": json.dumps(without)}
        join(parts, out, metadata)
        shutil.rmtree(work, ignore_errors=True)
    event("collected", f"{len(counts)} Grams of {tokens} tokens", path=out, grams=len(counts), tokens=tokens)
    return Collected(out, len(counts), tokens, without, by_blocks)


def _open(model: str) -> tuple[Path, Checkpoint]:
    reference = hub_reference(model, None)
    folder = model_path(model, None, "pymerge collect") if reference is None else fetch(*reference)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; give the folder of a model of transformers")
    return folder, open_checkpoint(folder)


def _digest(checkpoint: Checkpoint) -> str:
    """A hash of a model's weight files and config."""
    found = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for file in checkpoint.files:
        found.update(f"{file.name} {size_and_digest(file)[1]}\n".encode())
    return found.hexdigest()


def _there(out: Path, metadata: dict[str, str]) -> Collected:
    """Result of an existing file, if it is the one that was asked for."""
    header = read_header(out)
    differing = [key for key, value in metadata.items() if header.metadata.get(key) != value and key != "model"]
    if differing:
        raise OutputError(
            f"{out}: exists, and differs in {', '.join(differing)}; give another name, or delete it to collect anew"
        )
    without = tuple(json.loads(header.metadata["without"]))
    return Collected(out, len(header.entries), int(header.metadata["tokens"]), without, True, found_there=True)


class _Collection:
    """One collection at work."""

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        opened: Opened,
        inputs: Sequence[Batch],
        settings: Settings,
        device: torch.device,
        work: Path,
    ) -> None:
        self._folder, self._checkpoint, self._opened, self._inputs = folder, checkpoint, opened, inputs
        self._device, self._work, self._settings = device, work, settings
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._written = torch.float64 if settings.dtype == "float64" else torch.float32

    def carry_out(self, progress: bool) -> tuple[list[Path], Linears, bool]:
        """The files that hold the Grams, the layers, and whether the model ran block by block."""
        if self._opened.own is not None and not (self._work / _STATE).exists():
            try:
                return (*self._by_blocks(progress), True)
            except (VisitedTwiceError, RuntimeError) as error:
                if not isinstance(error, VisitedTwiceError) and "meta" not in str(error):  # weights not there
                    raise
                event("collect_whole", f"its blocks do not run one after the other ({error}): the whole is in memory")
                self._opened = open_model(self._folder, self._checkpoint)
        return (*self._whole(progress), False)

    def _call(self, model: Any, batch: Batch) -> None:
        run_on(model, self._folder, batch, self._dtype, self._device)

    def _by_blocks(self, progress: bool) -> tuple[list[Path], Linears]:
        model = self._opened.model
        linears = self._linears(model)
        with Reader(self._checkpoint.stamps) as reader, torch.no_grad():
            weights = Weights(self._opened, reader.read, self._dtype, self._device)
            weights.load_outside()
            files = {block: self._work / f"{block}.safetensors" for block in weights.blocks}
            inside = {block: self._layers(linears, f"{block}.") for block in files}
            owners = [name for layers in inside.values() for name in {name for name, _ in layers}]
            if len(set(owners)) < len(owners):
                raise VisitedTwiceError("a weight that several blocks share")
            outside = [pair for pair in self._layers(linears) if pair[0] not in owners]
            files = {block: file for block, file in files.items() if inside[block]}
            sums = Sums()
            total = len(weights.blocks) * len(self._inputs)
            with CountBar("collecting", total, shown=progress) as bar, sums.of(outside):

                def turn(block: str, passage: Passage) -> None:
                    weights.load(block)
                    own = Sums()

                    def after() -> None:
                        own.forget_last()
                        sums.forget_last()
                        bar.advance()

                    if block in files and not files[block].exists():
                        with own.of(inside[block]):
                            passage.through(after)
                        keep(files[block], own.means(self._written), own.counts)
                    else:
                        passage.through(after)
                    weights.free(block)

                works = [partial(self._call, model, batch) for batch in self._inputs]
                run_by_blocks(works, weights.blocks, turn)
            last = self._work / _OUTSIDE
            keep(last, sums.means(self._written), sums.counts)
            return [*(file for file in files.values() if file.exists()), last], linears

    def _linears(self, model: Any) -> Linears:
        """The layers whose inputs count. Raises ArgumentError where there is none."""
        found = linears_of(self._opened, model, self._checkpoint, self._settings.exclude)
        if not found.layers:
            left, remedy = "", "give a model that has some"
            if given := self._settings.exclude:
                left, remedy = f" that --exclude {' --exclude '.join(map(repr, given))} leaves", "exclude less"
            raise ArgumentError(
                f"{self._folder}: has no linear weight{left} whose inputs can be seen, so that there would be no Gram; "
                f"{remedy}"
            )
        return found

    def _layers(self, linears: Linears, inside: str = "") -> list[tuple[str, nn.Module]]:
        """Layers whose path begins so, with the names of their weights."""
        chosen = [(path, name) for path, name in linears.layers.items() if path.startswith(inside)]
        return [(name, self._opened.model.get_submodule(path)) for path, name in chosen]

    def _whole(self, progress: bool) -> tuple[list[Path], Linears]:
        model, missing = load_whole(self._folder, self._checkpoint, self._dtype, self._device)
        linears = self._linears(model)
        state, last = self._work / _STATE, self._work / _OUTSIDE
        sums, done = Sums(), 0
        if (before := kept(state)) is not None:
            sums.sums = {name: tensor.to(self._device) for name, tensor in tensors_of(state).items()}
            sums.counts, done = dict(before.counts), before.done
        layers = [(name, model.get_submodule(path)) for path, name in linears.layers.items()]
        written = time.monotonic()
        with CountBar("collecting", len(self._inputs), shown=progress) as bar, sums.of(layers), torch.no_grad():
            for number, batch in enumerate(self._inputs):
                if number >= done:
                    self._call(model, batch)
                    sums.forget_last()
                    if time.monotonic() - written > _SECONDS:
                        keep(state, sums.sums, sums.counts, number + 1)
                        written = time.monotonic()
                bar.advance()
        try:
            keep(last, sums.means(self._written), sums.counts)
        except NonFiniteError as error:
            if not missing:
                raise
            raise NonFiniteError(
                f"{self._folder}: lacks {listed(missing)}, and {error.found}", "give a model that has them"
            ) from None
        return [last], linears
