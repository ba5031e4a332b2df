"""The plan: every output tensor with its inputs, action, place and cost, from headers alone. All errors are here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from pymerge import env, pieces
from pymerge.checkpoint import ITEM_SIZES, Checkpoint, ShardLayout, TensorEntry, is_float8, layout_shards
from pymerge.config import MergeConfig, canonical, participants, resolve
from pymerge.errors import ArgumentError, ConfigError, PlanError
from pymerge.inputs import Inputs, listed, match_tensors, open_inputs
from pymerge.layers import Kind, Layer, classify, positions, unused_rules
from pymerge.memory import Budget
from pymerge.methods import get_method
from pymerge.methods.average import Copy, element_count
from pymerge.methods.base import Action, Method
from pymerge.schedule import CHUNK_ELEMENTS, Forecast, fit, forecast, slots
from pymerge.steps import Step
from pymerge.vocabulary import rows_of

DTYPE_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
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
    def tensors(self) -> int:
        """Number of tensors of the output."""
        return sum(len(layout.tensors) for layout in self.layouts)

    @property
    def parameters(self) -> int:
        """Number of elements of the output."""
        return sum(element_count(step.shape) for step in self.steps)

    @cached_property
    def forecast(self) -> Forecast:
        """How far the pipeline reads ahead, and what it then holds."""
        return forecast(slots(self.steps), self.budget.tensors)

    @property
    def peak_memory(self) -> int:
        """Upper bound in bytes of all tensors held at once: a piece in work, those read ahead, those to be written."""
        return self.forecast.peak

    @property
    def keeps_cache(self) -> bool:
        """Whether inputs and output stay in the page cache; if not, their pages are dropped as soon as possible."""
        return self.budget.keeps_cache(self.bytes_read + self.bytes_written)

    def fingerprint(self, backend: str, device: str) -> str:
        """Identifies the bytes that this plan will write: version, config, inputs, layout, backend and device."""
        content = {
            "version": env.version(),
            "config": canonical(self.config),
            "inputs": [[str(path), size, mtime] for path, (size, mtime) in sorted(self.inputs.stamps.items())],
            "shards": [hashlib.sha256(layout.header).hexdigest() for layout in self.layouts],
            "backend": backend,
            "device": device,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_plan(
    config: MergeConfig,
    budget: Budget,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
) -> Plan:
    """Plan a merge from the config and the headers of its inputs.

    Args:
        config: from `load_config`.
        budget: the memory that the merge may use.
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
        f"layers: pattern {pattern!r} finds no tensor of {donor.path}; correct or delete it"
        for pattern in unused_rules(layers, config.rules)
    ]
    matched = match_tensors(inputs, layers, config, problems)
    if problems:
        raise PlanError(problems)
    inputs, names, warnings = matched.inputs, matched.names, matched.warnings

    wanted = dtype or config.out_dtype or config.dtype
    if wanted is not None and wanted not in DTYPE_CODES:
        raise ArgumentError(f"unknown dtype {wanted!r}; choose one of {', '.join(DTYPE_CODES)}")
    small = [name for name in names if is_float8(donor.tensors[name].dtype)]
    if small and wanted is None:
        warnings.append(f"{listed(small)}: 8-bit floats in {donor.path}, written as bfloat16")
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
            for rows in rows_of(entry, experts):
                action_here = action if rows.experts else Copy()
                nbytes = element_count(rows.base.shape) * ITEM_SIZES[tensor.dtype]
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
        config_json=_config_json(donor, wanted),
    )


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
    if layer.kind is Kind.BUFFER:
        return entry.dtype
    return DTYPE_CODES[wanted] if wanted else "BF16" if is_float8(entry.dtype) else entry.dtype


def _config_json(donor: Checkpoint, wanted: str | None) -> bytes | None:
    """The donor's config.json; its dtype field, under the name that it uses, follows the output."""
    if not donor.config:
        return None
    config = dict(donor.config)
    for key in ("dtype", "torch_dtype"):
        if key in config and (wanted or "float8" in str(config[key])):
            config[key] = wanted or "bfloat16"
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
