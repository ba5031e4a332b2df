"""The plan: every output tensor with its inputs, action, place and cost, from headers alone. All errors are here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pymerge import env
from pymerge.architecture.roles import Kind, Layer, classify, unused_rules
from pymerge.architecture.token_tables import rows_of
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.common.dtypes import CODES, ITEM_SIZES, MERGED, is_float8
from pymerge.common.names import printable
from pymerge.config.merge_config import MergeConfig, canonical, participants, resolve
from pymerge.errors import ArgumentError, ConfigError, PlanError
from pymerge.methods import get_method
from pymerge.methods.base import Action, Method, Values
from pymerge.methods.linear import Copy
from pymerge.output.layout import ShardLayout, layout_shards
from pymerge.planner import pieces
from pymerge.planner.assemble import arrange
from pymerge.planner.budget import Budget
from pymerge.planner.inputs import Inputs, Part, listed, match_tensors, open_inputs
from pymerge.planner.jobs import CHUNK_ELEMENTS, WRITE_BEHIND, batches, fit, slots
from pymerge.planner.steps import Step
from pymerge.planner.tokens import align
from pymerge.planner.window import Forecast, forecast, waiting
from pymerge.tokenizers.planned import TokenPlan

DEFAULT_SHARD_BYTES = 5_000_000_000


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
        """What is read has on the disk; some of it is read more than once."""
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
        """How far the pipeline reads ahead, and what it then holds."""
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


def build_plan(
    config: MergeConfig,
    budget: Budget,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    planned: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Plan a merge from the config and the headers of its inputs.

    Args:
        config: from `load_config`.
        budget: the memory that the merge may use.
        max_shard_bytes: size above which a new output file is started.
        dtype: output dtype ("float32", ...), instead of the config's.
        planned: models, by their names in the config, that will be written before the merge runs (`Plan.checkpoint`).

    Raises:
        PlanError: with everything that is wrong: missing, extra or misshapen tensors, dtypes, memory.
        ConfigError, CheckpointError: an input cannot be opened at all.
        ArgumentError: an unknown `dtype`.
    """
    method = get_method(config.merge_method).given(config.base_model is not None)
    assembly = arrange(config, method, planned) if config.slices or config.modules else None
    inputs = assembly.inputs if assembly else open_inputs(config, method, planned)
    problems: list[str] = []
    donor = inputs.donor
    described = {name: (entry.dtype, entry.shape) for name, entry in donor.tensors.items()}
    layers = classify(described, donor.config, config.rules)
    problems += [
        f"{config.name}: layers: pattern {pattern!r} finds no tensor of {donor.path}; correct or delete it"
        for pattern in unused_rules(layers, config.rules)
    ]
    matched = assembly.match(layers, problems) if assembly else match_tensors(inputs, layers, config, problems)
    if problems:
        raise PlanError(problems)
    names, warnings = matched.names, matched.warnings
    aligned = align(matched, layers, config, method)
    inputs, tokens = aligned.inputs, aligned.tokens
    donor, stored = inputs.donor, donor.tensors  # gathered tables may have a wider dtype

    wanted = dtype or config.out_dtype or config.dtype
    if wanted is not None and wanted not in MERGED:
        raise ArgumentError(f"unknown dtype {wanted!r}; choose one of {', '.join(MERGED)}")
    small = [name for name in names if is_float8(stored[name].dtype)]
    if small and wanted is None:
        warnings.append(f"{listed(small)}: 8-bit floats in {donor.path}, written as bfloat16")
    placed = layout_shards(
        [(name, _output_dtype(stored[name], layers[name], wanted), donor.tensors[name].shape) for name in names],
        max_shard_bytes,
    )
    steps = []
    wrong: dict[str, list[str]] = {}  # the same mistake is often made for many tensors
    for shard in placed:
        for tensor in shard.tensors:
            layer, entry = layers[tensor.name], donor.tensors[tensor.name]
            try:
                action, experts, values = _action(aligned.parts[tensor.name], method, tensor.name, layer)
            except (ArgumentError, ConfigError) as error:
                wrong.setdefault(str(error), []).append(tensor.name)
                continue
            for rows in rows_of(entry, experts):
                action_here = action if rows.experts else Copy()
                nbytes = math.prod(rows.base.shape) * ITEM_SIZES[tensor.dtype]
                steps.append(
                    Step(
                        name=tensor.name,
                        layer=layer,
                        action=action_here,
                        shape=rows.base.shape,
                        dtype=tensor.dtype,
                        base=rows.base,
                        experts=rows.experts,
                        reads_base=method.needs_base or isinstance(action_here, Copy),
                        file=shard.file,
                        offset=tensor.offset + (tensor.nbytes - nbytes if rows.start else 0),
                        nbytes=nbytes,
                        pieces=tuple(pieces.split(layer, action_here, rows.base.shape, CHUNK_ELEMENTS)),
                        values=values,
                    )
                )
    if wrong:
        raise PlanError(f"{listed(names)}: {message}" for message, names in wrong.items())
    return Plan(
        config=config,
        method=method,
        inputs=inputs,
        steps=fit(steps, budget),
        layouts=placed,
        warnings=(*config.warnings, *warnings),
        budget=budget,
        config_json=_config_json(donor, wanted, tokens.config),
        dtype=wanted,
        base_parameters=sum(donor.tensors[name].numel for name in names),
        tokens=tokens,
    )


def _flat(canonical_config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config, those of `parameters` and `models` one by one."""
    for key, value in canonical_config.items():
        if key == "parameters":
            yield from ((f"parameters.{name}", each) for name, each in value.items())
        elif key == "models":
            yield from ((f"models[{number}]", each) for number, each in enumerate(value))
        else:
            yield key, value


def _action(
    part: Part, method: Method, name: str, layer: Layer
) -> tuple[Action, tuple[TensorEntry, ...], Values | None]:
    """The action of one tensor, the entries of the experts that it reads, and the parameters behind it."""
    if layer.kind is Kind.BUFFER or not part.experts:
        return Copy(), (), None
    chosen = participants(part.config, method)
    names = part.input_names(name, layer)
    values = resolve(part.config, method, name, part.positions[name], chosen, names)
    action = method.action(name, layer.solvable, values, len(part.experts))
    if isinstance(action, Copy):
        return action, (), values
    return action, tuple(expert.tensors[name] for expert in part.experts), values


def _output_dtype(entry: TensorEntry, layer: Layer, wanted: str | None) -> str:
    if layer.kind is Kind.BUFFER:
        return entry.dtype
    return CODES[wanted] if wanted else "BF16" if is_float8(entry.dtype) else entry.dtype


def _config_json(donor: Checkpoint, wanted: str | None, keys: Mapping[str, Any]) -> bytes | None:
    """The donor's config.json; its dtype field, under the name that it uses, follows the output, and so do
    `keys`, in the config or in its text_config, whichever has them."""
    if not donor.config:
        return None
    config = dict(donor.config)
    for key in ("dtype", "torch_dtype"):
        if key in config and (wanted or "float8" in str(config[key])):
            config[key] = wanted or "bfloat16"
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config["text_config"] = {**nested, **{key: value for key, value in keys.items() if key in nested}}
        keys = {key: value for key, value in keys.items() if key in config or key not in nested}
    config |= keys
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
