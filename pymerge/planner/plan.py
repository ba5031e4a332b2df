"""The plan of a merge: its steps, the layout of its files, and what it will read, write and hold in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pymerge import env
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.common.names import printable
from pymerge.config.merge_config import MergeConfig, canonical
from pymerge.methods.base import Method
from pymerge.output.layout import ShardLayout
from pymerge.planner.budget import Budget
from pymerge.planner.inputs import Inputs
from pymerge.planner.jobs import WRITE_BEHIND, batches, slots
from pymerge.planner.steps import Step
from pymerge.planner.window import Forecast, forecast, waiting
from pymerge.tokenizers.planned import TokenPlan


@dataclass(frozen=True)
class Plan:
    """All that a merge will do. Made by `build_plan`; the engine only follows it."""

    config: MergeConfig
    method: Method
    inputs: Inputs
    steps: tuple[Step, ...]
    layouts: tuple[ShardLayout, ...]
    warnings: tuple[str, ...]
    budget: Budget
    config_json: bytes | None  # of the output; None if the donor has none
    dtype: str | None  # of the output; None for that of the donor
    base_parameters: int  # elements of the donor in the output's vocabulary, a tied head counted once
    tokens: TokenPlan

    @property
    def bytes_read(self) -> int:
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_input(self) -> int:
        """Bytes of the inputs on the disk, those that are read more than once counted once."""
        return sum(step.bytes_input for step in self.steps)

    @property
    def bytes_written(self) -> int:
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def tensors(self) -> int:
        """Number of tensors of the output."""
        return sum(len(layout.tensors) for layout in self.layouts)

    @property
    def parameters(self) -> int:
        """Number of elements of the output."""
        return sum(math.prod(step.shape) for step in self.steps)

    @cached_property
    def forecast(self) -> Forecast:
        """Forecast of how far the pipeline reads ahead, and of what it then holds."""
        return forecast(batches(self.steps, self.budget), self.budget.tensors)

    @cached_property
    def peak_memory(self) -> int:
        """Upper bound in bytes of all tensors held at once: a piece in work, those read ahead, those to be written."""
        count, nbytes = waiting(slots(self.steps)) if self.budget.device == "cpu" else (0, 0)
        more = count * nbytes if count > WRITE_BEHIND else 0
        return min(self.budget.tensors, self.forecast.peak + more)

    @property
    def keeps_cache(self) -> bool:
        """Whether inputs and output stay in the page cache; if not, their pages are dropped as soon as possible."""
        return self.budget.keeps_cache(self.bytes_input + self.bytes_written)

    def summary(self) -> dict[str, Any]:
        """The plan in a few numbers: sizes in bytes, work in floating-point operations."""
        return {
            "method": self.method.name,
            "models": [str(checkpoint.path) for checkpoint in self.inputs.all],
            "tensors": len(self.steps),
            "parameters": self.parameters,
            "shards": len(self.layouts),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "flops": self.flops,
            "peak_memory": self.peak_memory,
        }

    def checkpoint(self, out: Path) -> Checkpoint:
        """The output as it will be in the folder `out`, for plans of what is merged from it."""
        tensors = {
            tensor.name: TensorEntry(
                tensor.name, tensor.dtype, tensor.shape, out / layout.file, tensor.offset, tensor.nbytes
            )
            for layout in self.layouts
            for tensor in layout.tensors
        }
        config = json.loads(self.config_json) if self.config_json else {}
        return Checkpoint(
            out,
            files=tuple(out / layout.file for layout in self.layouts),
            tensors=tensors,
            config=config,
            other_files=self.inputs.donor.other_files,
            stamps={},
        )

    def identity(self, backend: str, device: str, processor: str) -> dict[str, str]:
        """All that decides the bytes of the output, by name: versions, config, inputs, layout, backend, device."""
        headers = hashlib.sha256(b"".join(layout.header for layout in self.layouts))
        versions = env.package_versions()
        decisive = ["pymerge-engine", "torch"] + (["triton"] if device.startswith("cuda") else [])
        parts = {f"{name} version": versions[name] for name in decisive}
        parts |= {f"config {key}": json.dumps(value) for key, value in _flat(canonical(self.config))}
        parts |= {
            f"input {printable(path)}": f"{size} bytes, {time} ns" for path, (size, time) in self.inputs.stamps.items()
        }
        parts |= {f"input {printable(path)}": stamp for path, stamp in self.inputs.carried.items()}
        if self.tokens.digest:
            parts["tokenizer"] = self.tokens.digest
        parts |= {"output dtype": self.dtype or "as in the base", "output files": headers.hexdigest()}
        return parts | {"backend": backend, "device": device, "processor": processor}


def _flat(canonical_config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config, those of `parameters` and `models` one by one."""
    for key, value in canonical_config.items():
        if key == "parameters":
            yield from ((f"parameters.{name}", each) for name, each in value.items())
        elif key == "models":
            yield from ((f"models[{number}]", each) for number, each in enumerate(value))
        else:
            yield key, value
