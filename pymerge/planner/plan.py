"""The plan of a merge: its steps, the layout of its files, and what it will read, write and hold in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pymerge import env
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from pymerge.checkpoint.composed import stored
from pymerge.common.names import printable
from pymerge.config.merge_config import MergeConfig, canonical
from pymerge.errors import CheckpointError
from pymerge.methods.base import Method
from pymerge.output.layout import ShardLayout
from pymerge.planner.budget import Budget
from pymerge.planner.extras import Extras
from pymerge.planner.inputs import Inputs
from pymerge.planner.jobs import batches
from pymerge.planner.steps import Step
from pymerge.planner.window import Forecast, forecast
from pymerge.planner.workers import Target
from pymerge.tokenizers.planned import TokenPlan

GIVEN_FILES = "given files"  # the part of an identity


@dataclass(frozen=True)
class Plan:
    """All that a merge will do. Made by `build_plan`; the engine only follows it."""

    config: MergeConfig
    method: Method
    inputs: Inputs
    steps: tuple[Step, ...]
    layouts: tuple[ShardLayout, ...]  # of the model's files, or of its transformer's
    modules: tuple[ShardLayout, ...]  # of the files of other modules of sentence-transformers
    warnings: tuple[str, ...]
    budget: Budget
    config_json: bytes | None  # of the output; None if the donor has none
    dtype: str | None  # of the output; None for that of the donor
    base_parameters: int  # elements of the donor in the output's vocabulary, a tied head counted once
    tokens: TokenPlan
    target: Target
    carried: Mapping[Path, str]  # sizes and times of the donor's other files, when the plan was made
    extras: Extras = field(default_factory=Extras)  # files beside the model; sizes below are the model's alone
    given: Mapping[str, bytes | None] = field(default_factory=dict)  # small files to add, or (None) to leave out

    @property
    def bytes_read(self) -> int:
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_input(self) -> int:
        """Bytes of the inputs on the disk, those that are read more than once counted once."""
        return sum(step.bytes_input for step in self.steps)

    @property
    def files(self) -> tuple[ShardLayout, ...]:
        """Layouts of all files of the model's weights."""
        return (*self.layouts, *self.modules)

    @property
    def bytes_written(self) -> int:
        return sum(layout.nbytes for layout in self.files)

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def tensors(self) -> int:
        """Number of tensors of the output."""
        return sum(len(layout.tensors) for layout in self.files)

    @property
    def parameters(self) -> int:
        """Number of elements of the output."""
        return sum(math.prod(step.shape) for step in self.steps)

    @cached_property
    def forecast(self) -> Forecast:
        """Forecast of how far the executor works ahead, and of what it then holds."""
        return forecast(
            batches(self.steps, self.budget, (), self.target.threads), self.budget.tensors, self.target.threads
        )

    @property
    def peak_memory(self) -> int:
        """Upper bound in bytes of all tensors held at once: pieces in work, those read ahead, those to be written."""
        return self.forecast.peak

    @property
    def needs_torch(self) -> bool:
        """Whether a step is carried out by PyTorch; otherwise it is not imported."""
        steps = (*self.steps, *self.extras.steps)
        return not self.target.takes_arrays or any(step.needs_torch for step in steps)

    @property
    def needs_blas(self) -> bool:
        """Whether numpy multiplies and decomposes matrices, whose results depend on its version and the processor."""
        return any(step.worker == "core" for step in self.steps)

    @property
    def keeps_cache(self) -> bool:
        """Whether inputs and output stay in the page cache; if not, their pages are dropped as soon as possible."""
        beside = self.extras.bytes_read + self.extras.bytes_written
        return self.budget.keeps_cache(self.bytes_input + self.bytes_written + beside)

    def summary(self) -> dict[str, Any]:
        """The plan in a few numbers: sizes in bytes, work in floating-point operations."""
        return {
            "method": self.method.name,
            "models": [str(checkpoint.path) for checkpoint in self.inputs.all],
            "tensors": len(self.steps),
            "parameters": self.parameters,
            "shards": len(self.files),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "flops": self.flops,
            "peak_memory": self.peak_memory,
            "memory_limit": self.budget.tensors,
        }

    def checkpoint(self, out: Path) -> Checkpoint:
        """The output as it will be in the folder `out`, for plans of what is merged from it."""
        donor = self.inputs.donor
        config = json.loads(self.config_json) if self.config_json else {}
        copies = [step for step in self.steps if not step.experts and step.shape == step.base.shape]
        origins = {(out / step.file, step.plain_name): self.inputs.stored(step.base) for step in copies}
        copied = {place: origin for place, origin in origins.items() if origin is not None}
        main = _written(out, self.layouts)
        modules = {
            folder: _written(out, [layout for layout in self.modules if Path(layout.file).parent.as_posix() == folder])
            for folder in donor.modules
        }
        return replace(
            main,
            config=config,
            other_files=donor.other_files,
            copied=copied,
            folder=donor.folder,
            stem=donor.stem,
            beside=replace(donor.beside, unused=()),
            parts=donor.parts,
            modules={folder: replace(each, path=out / folder, copied=copied) for folder, each in modules.items()},
        )

    def settled(self) -> Plan:
        """This plan when models that it was to find written are there: with their sizes, times and files.

        Raises CheckpointError if one is not what was planned.
        """
        donor, experts = _settled(self.inputs.donor), tuple(map(_settled, self.inputs.experts))
        inputs = replace(self.inputs, donor=donor, experts=experts)
        return replace(self, inputs=inputs, carried=self.carried or inputs.carried)

    def check_inputs(self) -> None:
        """Raise CheckpointError if a file of the inputs has changed since the plan was made."""
        for path, (size, time) in self.inputs.stamps.items():
            try:
                status = path.stat()
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); put it back or plan again") from None
            if (status.st_size, status.st_mtime_ns) != (size, time):
                raise CheckpointError(f"{path}: has changed since the merge was planned; plan it again")
        now = self.inputs.carried
        for path in sorted(now.keys() | self.carried.keys()):
            if now.get(path) != self.carried.get(path):
                raise CheckpointError(f"{path}: has changed since the merge was planned; plan it again")

    def identity(self, processor: str) -> dict[str, str]:
        """All that decides the bytes of the output, by name: versions, config, inputs, layout, backend, device."""
        # Which one of several GPUs it is decides nothing; their names are in `processor`.
        backend, device = self.target.backend, self.target.device.type
        headers = hashlib.sha256(b"".join(layout.header for layout in self.files))
        versions = env.package_versions()
        decisive = ["pymerge-engine", *(["torch"] if self.needs_torch else [])]
        decisive += ["numpy"] if self.needs_blas else []
        decisive += ["triton"] if device == "cuda" else []
        decisive += ["gguf"] if any(path.suffix == ".gguf" for path in self.inputs.stamps) else []
        parts = {f"{name} version": versions[name] for name in decisive}
        parts |= {f"config {key}": json.dumps(value) for key, value in _flat(canonical(self.config))}
        parts |= {
            f"input {printable(path)}": f"{size} bytes, {time} ns" for path, (size, time) in self.inputs.stamps.items()
        }
        parts |= {f"input {printable(path)}": stamp for path, stamp in self.carried.items()}
        if self.tokens.digest:
            parts["tokenizer"] = self.tokens.digest
        parts |= {"output dtype": self.dtype or "as in the base", "output files": headers.hexdigest()}
        parts |= {"backend": backend, "device": device, "processor": processor}
        if self.given:
            digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.given.items() if data is not None}
            parts[GIVEN_FILES] = json.dumps([sorted(digests.items()), sorted(self.given.keys() - digests.keys())])
        return parts | dict(self.extras.identity)


def _written(out: Path, layouts: Sequence[ShardLayout]) -> Checkpoint:
    """Files of an output as a checkpoint that is yet to be written."""
    tensors = {
        tensor.name: TensorEntry(
            tensor.name, tensor.dtype, tensor.shape, out / layout.file, tensor.offset, tensor.nbytes
        )
        for layout in layouts
        for tensor in layout.tensors
    }
    return Checkpoint(out, tuple(out / layout.file for layout in layouts), tensors, {}, (), {})


def _settled(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.base is not None:
        base = _settled(checkpoint.base)
        return replace(checkpoint, base=base, stamps=checkpoint.stamps | base.all_stamps)
    if checkpoint.stamps:
        return checkpoint
    found = open_checkpoint(checkpoint.path)
    _check_settled(checkpoint, found)
    for folder, module in checkpoint.modules.items():
        _check_settled(module, found.modules[folder])
    return replace(checkpoint, stamps=found.stamps, other_files=found.other_files, modules=found.modules)


def _check_settled(planned: Checkpoint, found: Checkpoint) -> None:
    for name, entry in ((name, part) for name, whole in planned.tensors.items() for part in stored(whole)):
        if entry.file not in planned.files:  # another model's, of slices or in place of what this one lacks
            continue
        there = found.tensors.get(entry.name)
        if there is None or (there.dtype, there.shape, there.offset) != (entry.dtype, entry.shape, entry.offset):
            raise CheckpointError(f"{planned.path}: tensor {name!r} is not as it was planned; plan again")


def _flat(canonical_config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config, those of `parameters` and `models` one by one."""
    for key, value in canonical_config.items():
        if key == "parameters":
            yield from ((f"parameters.{name}", each) for name, each in value.items())
        elif key == "models":
            yield from ((f"models[{number}]", each) for number, each in enumerate(value))
        else:
            yield key, value
