"""Grams of a merge by data: of each block's inputs in the merged model, taken when all blocks before are merged.

A block of every expert runs on what the merged model gives it for that expert's data, its Grams are kept in the work
folder of the output, and the block is merged by them; then all data go through the merged block, to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from logging import WARNING
from pathlib import Path

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry, read_header
from pymerge.common.dtypes import code_of
from pymerge.common.events import event
from pymerge.common.names import listed
from pymerge.common.progress import CountBar
from pymerge.errors import PlanError
from pymerge.grams.data import batches, read_samples
from pymerge.grams.merging import merge_in_memory
from pymerge.grams.model import Opened, Weights, run_on
from pymerge.grams.network import INSTEAD, network_of
from pymerge.grams.sums import Sums
from pymerge.grams.turns import Passage, VisitedTwiceError, run_by_blocks
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import full_name, layout_file
from pymerge.planner.data import folders, gram_files, setting, solved_by, solving
from pymerge.planner.grams import StoredGram
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step


def with_grams_of_data(plan: Plan, output: OutputDirectory, *, shown: bool) -> Plan:
    """The plan of a merge by data, with the Grams of every weight that is solved, in interim files of its output.

    Weights are in memory one block at a time, with those in no block, the Grams of one expert's block, and the hidden
    states of all samples of all experts. Grams that an earlier run has kept are not taken again.

    Args:
        shown: show a progress bar on standard error.

    Raises:
        CheckpointError, ArgumentError: data, tokenizer or models do not fit.
        PlanError: the network's blocks do not run one after the other.
    """
    with Reader(plan.inputs.stamps) as reader, torch.no_grad():
        return _Sequence(plan, output, reader).carry_out(shown)


class _Sequence:
    """One pass through the blocks."""

    def __init__(self, plan: Plan, output: OutputDirectory, reader: Reader) -> None:
        self._plan, self._output, self._reader = plan, output, reader
        self._folder, self._experts = plan.inputs.donor.path, plan.inputs.experts
        self._steps = {step.name: step for step in plan.steps}
        self._files = gram_files(plan.steps)
        grams = [gram for step in plan.steps if (action := solving(step.action)) for gram in action.grams]
        self._dtype = torch.float64 if any(gram.dtype == "F64" for gram in grams) else torch.float32
        self._device = torch.device(str(plan.target.device))
        self._run = Runner(plan.target.backend, plan.target.device)
        network = network_of(plan.inputs.donor)
        self._layers, self._model = network.blocks, network.opened.model
        self._names = {id(entry): name for name, entry in plan.inputs.donor.tensors.items()}
        own = network.opened.own or {}
        self._own = {own: entry for own, entry in own.items() if self._name(entry) in self._steps}  # no tied heads
        self._weights = Weights(Opened(self._model, self._own), reader.read, self._dtype, self._device)

    def _name(self, entry: TensorEntry) -> str:
        """Name in the output of a tensor of the donor."""
        return self._names[id(entry)]

    def carry_out(self, shown: bool) -> Plan:
        """Take all Grams; returns the plan that has them."""
        if not self._files:
            return self._plan
        works, owners = self._works()
        with CountBar("collecting", 2 * len(works) * len(self._weights.blocks), shown=shown) as bar:
            self._load_outside()

            def turn(block: str, passage: Passage) -> None:
                self._collect(block, passage, owners, bar)
                merged = self._merged([self._name(entry) for entry in self._weights.entries(block)])
                self._weights.load(block, lambda entry: merged[self._name(entry)])
                passage.through(bar.advance)
                self._weights.free(block)

            try:
                run_by_blocks(works, self._weights.blocks, turn)
            except VisitedTwiceError as error:
                text = f"{self._folder}: its blocks do not run one after the other ({error}); {INSTEAD}"
                raise PlanError([text]) from error
        if unvisited := self._lacking(self._files):
            event("no_inputs", f"{listed(unvisited)}: no data reach it: averaged", level=WARNING, tensors=unvisited)
            self._settle(unvisited)
            for expert in range(len(self._experts)):
                self._write(unvisited, expert, {})
        return replace(self._plan, steps=tuple(map(self._known, self._plan.steps)))

    def _works(self) -> tuple[list[Callable[[], None]], list[int]]:
        """Runs of the model on all batches, and whose data each one has."""
        samples, length, batch = (setting(self._plan.steps, name) for name in ("samples", "length", "batch"))
        works: list[Callable[[], None]] = []
        owners: list[int] = []
        for expert, folder in enumerate(folders(self._plan.steps)):
            found = batches(read_samples(folder, samples), self._model, self._folder, length, batch, None)
            works += [partial(run_on, self._model, self._folder, each, self._dtype, self._device) for each in found]
            owners += [expert] * len(found)
        return works, owners

    def _load_outside(self) -> None:
        inside = {id(entry) for block in self._weights.blocks for entry in self._weights.entries(block)}
        merged = self._merged({self._name(entry): None for entry in self._own.values() if id(entry) not in inside})
        self._weights.load_outside(lambda entry: merged[self._name(entry)])

    def _merged(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Tensors as they will be in the output."""
        return merge_in_memory(self._plan, [self._known(self._steps[name]) for name in names], self._reader, self._run)

    def _collect(self, block: str, passage: Passage, owners: Sequence[int], bar: CountBar) -> None:
        """Keep the Grams of a block that are not kept yet."""
        lacking = self._lacking(name for name, _ in self._layers[block] if name in self._files)
        self._settle(lacking)
        layers = [(name, layer) for name, layer in self._layers[block] if name in lacking]
        for number, expert in enumerate(self._experts if lacking else ()):
            self._weights.load(block, partial(self._of_expert, expert))
            sums = Sums()

            def after(sums: Sums = sums) -> None:
                sums.forget_last()
                bar.advance()

            with sums.of(layers):
                passage.try_out([run for run, owner in enumerate(owners) if owner == number], after)
            self._weights.free(block)
            self._write(lacking, number, sums.means(self._dtype))
        for _ in () if lacking else owners:
            bar.advance()

    def _of_expert(self, expert: Checkpoint, entry: TensorEntry) -> Tensor:
        return self._reader.read(expert.tensors[self._name(entry)])

    def _lacking(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._files[name] not in self._output.finished]

    def _settle(self, names: Sequence[str]) -> None:
        """Say what the files of these weights will hold: a Gram of each expert."""
        for name in names:
            size = self._size(name)
            grams = [(self._gram(name, t), code_of(self._dtype), (size, size)) for t in range(len(self._experts))]
            self._output.settle(layout_file(self._files[name], grams))

    def _write(self, names: Sequence[str], expert: int, grams: Mapping[str, Tensor]) -> None:
        """Keep the Grams of an expert; 0 stands for those of weights that nothing came to."""
        for name in names:
            size = self._size(name)
            gram = grams[name] if name in grams else torch.zeros(size, size, dtype=self._dtype)
            self._output.write(full_name(self._files[name], self._gram(name, expert)), gram)

    def _gram(self, name: str, expert: int) -> str:
        """Name of a Gram in its file, which no other file has."""
        return f"{Path(self._files[name]).stem}.{expert}"

    def _size(self, name: str) -> int:
        step = self._steps[name]
        return step.shape[-1 if step.role.in_axis == 1 else -2]

    def _known(self, step: Step) -> Step:
        """The step with the Grams that are kept of its weight."""
        if step.name not in self._files:
            return step
        header = read_header(self._output.place_of(self._files[step.name]))
        stamp = (header.file_bytes, header.mtime_ns)
        names = [self._gram(step.name, t) for t in range(len(self._experts))]
        return solved_by(step, [StoredGram(header.entries[name], stamp) for name in names])
