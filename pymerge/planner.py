"""The plan: every output tensor with its inputs, action, place and cost, from headers alone. All errors are here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pymerge import env, pieces
from pymerge.checkpoint import ITEM_SIZES, Checkpoint, ShardLayout, TensorEntry, layout_shards, printable
from pymerge.config import MergeConfig, canonical, participants, resolve
from pymerge.errors import ArgumentError, ConfigError, PlanError
from pymerge.inputs import Inputs, listed, match_tensors, open_inputs, tied_heads
from pymerge.layers import Kind, Layer, classify, positions, unused_rules
from pymerge.methods import get_method
from pymerge.methods.average import Copy, element_count
from pymerge.methods.base import Action, Method
from pymerge.pieces import Piece
from pymerge.units import format_bytes

DTYPE_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DEFAULT_SHARD_BYTES = 5_000_000_000
# Elements of a row range of an elementwise step: large enough that a read is one long request, small beside a layer.
_CHUNK_ELEMENTS = 16 * 2**20
# Pieces in memory at once: one being computed, and next to it the inputs of others being read or outputs written.
READ_AHEAD = 2
WRITE_BEHIND = 2


@dataclass(frozen=True)
class Step:
    """One output tensor: what is read, what is done, and where the result goes."""

    name: str
    layer: Layer
    action: Action
    shape: tuple[int, ...]
    dtype: str  # safetensors code of the output
    base: TensorEntry  # W_0; for methods without a base, only the donor of name, shape and dtype
    experts: tuple[TensorEntry, ...]  # what takes part beside the base; empty for a copy
    reads_base: bool
    file: str
    offset: int  # of the first byte in the output file
    nbytes: int
    pieces: tuple[Piece, ...]

    @property
    def inputs(self) -> tuple[TensorEntry, ...]:
        """All tensors read, the base first."""
        return (self.base, *self.experts) if self.reads_base else self.experts

    @property
    def bytes_read(self) -> int:
        return sum(entry.nbytes for entry in self.inputs)

    @cached_property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two."""
        return sum(pieces.cost(self.layer, self.action, piece, len(self.experts)).flops for piece in self.pieces)

    def input_bytes(self, piece: Piece) -> int:
        """Bytes of the inputs of one piece, as stored."""
        return element_count(piece.shape) * sum(ITEM_SIZES[entry.dtype] for entry in self.inputs)

    def output_bytes(self, piece: Piece) -> int:
        """Bytes of the result of one piece."""
        return element_count(piece.shape) * ITEM_SIZES[self.dtype]

    def peak_bytes(self, piece: Piece) -> int:
        """Inputs, scratch and output of one piece while it is computed."""
        scratch = pieces.cost(self.layer, self.action, piece, len(self.experts)).workspace
        return self.input_bytes(piece) + scratch + self.output_bytes(piece)


@dataclass(frozen=True)
class Plan:
    """All that a merge will do. Made by `build_plan`; the engine only follows it."""

    config: MergeConfig
    method: Method
    inputs: Inputs
    steps: tuple[Step, ...]
    layouts: tuple[ShardLayout, ...]
    warnings: tuple[str, ...]
    memory: int | None  # limit in bytes for tensors in memory, None for no limit
    config_json: bytes | None  # of the output; None if the donor has none
    dtype: str | None  # of the output; None for that of the donor
    base_parameters: int  # elements of the donor, a tied head counted once

    @property
    def bytes_read(self) -> int:
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_written(self) -> int:
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def parameters(self) -> int:
        """Number of elements of the output."""
        return sum(element_count(step.shape) for step in self.steps)

    @cached_property
    def peak_memory(self) -> int:
        """Upper bound in bytes of all tensors held at once: a piece in work, those read ahead, those to be written."""
        both = [(step, piece) for step in self.steps for piece in step.pieces]
        working = max((step.peak_bytes(piece) for step, piece in both), default=0)
        reading = max((step.input_bytes(piece) for step, piece in both), default=0)
        writing = max((step.output_bytes(piece) for step, piece in both), default=0)
        return working + READ_AHEAD * reading + WRITE_BEHIND * writing

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
        parts |= {"output dtype": self.dtype or "as in the base", "output files": headers.hexdigest()}
        return parts | {"backend": backend, "device": device, "processor": processor}


def build_plan(
    config: MergeConfig,
    *,
    memory: int | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
) -> Plan:
    """Plan a merge from the config and the headers of its inputs.

    Args:
        config: from `load_config`.
        memory: limit in bytes for the tensors held in memory at once.
        max_shard_bytes: size above which a new output file is started.
        dtype: output dtype ("float32", ...), instead of the config's.

    Raises:
        PlanError: with everything that is wrong: missing, extra or misshapen tensors, dtypes, memory.
        ConfigError, CheckpointError: an input cannot be opened at all.
        ArgumentError: an unknown `dtype`.
    """
    method = get_method(config.merge_method)
    inputs = open_inputs(config, method)
    problems: list[str] = []
    donor = inputs.donor
    described = {name: (entry.dtype, entry.shape) for name, entry in donor.tensors.items()}
    layers = classify(described, donor.config, config.rules)
    problems += [
        f"{config.name}: layers: pattern {pattern!r} finds no tensor of {donor.path}; correct or delete it"
        for pattern in unused_rules(layers, config.rules)
    ]
    names, warnings = match_tensors(inputs, layers, config, problems)
    tied = tied_heads(donor, layers)
    if problems:
        raise PlanError(problems)

    wanted = dtype or config.out_dtype or config.dtype
    if wanted is not None and wanted not in DTYPE_CODES:
        raise ArgumentError(f"unknown dtype {wanted!r}; choose one of {', '.join(DTYPE_CODES)}")
    placed = layout_shards(
        [(name, _output_dtype(donor.tensors[name], layers[name], wanted), donor.tensors[name].shape) for name in names],
        max_shard_bytes,
    )
    places = positions(layers, donor.config)
    steps = []
    wrong: dict[str, list[str]] = {}  # the same mistake is often made for many tensors
    for shard in placed:
        for tensor in shard.tensors:
            layer, entry = layers[tensor.name], donor.tensors[tensor.name]
            try:
                action, experts = _action(config, method, inputs, tensor.name, layer, places[tensor.name])
            except (ArgumentError, ConfigError) as error:
                wrong.setdefault(str(error), []).append(tensor.name)
                continue
            steps.append(
                Step(
                    name=tensor.name,
                    layer=layer,
                    action=action,
                    shape=entry.shape,
                    dtype=tensor.dtype,
                    base=entry,
                    experts=experts,
                    reads_base=method.needs_base or isinstance(action, Copy),
                    file=shard.file,
                    offset=tensor.offset,
                    nbytes=tensor.nbytes,
                    pieces=tuple(pieces.split(layer, action, entry.shape, _CHUNK_ELEMENTS)),
                )
            )
    if wrong:
        raise PlanError(f"{listed(names)}: {message}" for message, names in wrong.items())
    plan = Plan(
        config=config,
        method=method,
        inputs=inputs,
        steps=tuple(steps),
        layouts=placed,
        warnings=(*config.warnings, *warnings),
        memory=memory,
        config_json=_config_json(donor, wanted),
        dtype=wanted,
        base_parameters=sum(entry.numel for name, entry in donor.tensors.items() if name not in tied),
    )
    _check_memory(plan)
    return plan


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
    config: MergeConfig, method: Method, inputs: Inputs, name: str, layer: Layer, position: float
) -> tuple[Action, tuple[TensorEntry, ...]]:
    """The action of one tensor and the entries of the experts that it reads."""
    if layer.kind is Kind.BUFFER:
        return Copy(), ()
    values = resolve(config, method, name, position, participants(config, method))
    action = method.action(name, layer.solvable, values, len(inputs.experts))
    if isinstance(action, Copy):
        return action, ()
    return action, tuple(expert.tensors[name] for expert in inputs.experts)


def _output_dtype(entry: TensorEntry, layer: Layer, wanted: str | None) -> str:
    return entry.dtype if wanted is None or layer.kind is Kind.BUFFER else DTYPE_CODES[wanted]


def _config_json(donor: Checkpoint, wanted: str | None) -> bytes | None:
    """The donor's config.json; its dtype field, under the name that it uses, follows the output."""
    if not donor.config:
        return None
    config = dict(donor.config)
    if wanted is not None:
        config.update({key: wanted for key in ("dtype", "torch_dtype") if key in config})
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _check_memory(plan: Plan) -> None:
    if plan.memory is None or plan.peak_memory <= plan.memory:
        return
    largest = max(plan.steps, key=lambda step: max(step.peak_bytes(piece) for piece in step.pieces))
    raise PlanError(
        [
            f"memory: the merge holds up to {format_bytes(plan.peak_memory)} of tensors at once (the largest step is "
            f"{largest.name!r}, {largest.action.label}), the limit is {format_bytes(plan.memory)}; "
            f"give --memory {format_bytes(plan.peak_memory, round_up=True)} or more, or exclude that tensor"
        ]
    )
