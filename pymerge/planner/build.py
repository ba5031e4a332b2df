"""Building a plan: each output tensor with its inputs, action, place and cost, from headers alone. Errors come here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge.architecture.roles import classify, unused_rules
from pymerge.architecture.token_tables import rows_of
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.common.dtypes import ITEM_SIZES, MERGED
from pymerge.common.names import listed
from pymerge.config.merge_config import MergeConfig
from pymerge.errors import ArgumentError, ConfigError, PlanError
from pymerge.methods import get_method
from pymerge.methods.actions import copy
from pymerge.methods.base import Method
from pymerge.methods.reduce import Reduce
from pymerge.output.layout import ShardLayout, full_name, layout_file, layout_shards
from pymerge.planner import pieces
from pymerge.planner.budget import Budget
from pymerge.planner.config_differences import check_configs
from pymerge.planner.constants import Constant, differing, find_constants
from pymerge.planner.data import stamps_of_data
from pymerge.planner.decide import copies, decide
from pymerge.planner.fit import CHUNK_ELEMENTS, fit
from pymerge.planner.folder import FolderInputs, Whole, beside_warnings, joined, match_modules
from pymerge.planner.grams import remarks_on_grams, stamps_of
from pymerge.planner.inputs import open_inputs
from pymerge.planner.integers import check_integers
from pymerge.planner.layers import with_layers
from pymerge.planner.match import Section, match_tensors
from pymerge.planner.output_dtypes import output_dtypes, with_dtype
from pymerge.planner.plan import Plan
from pymerge.planner.routes import remarks, routed
from pymerge.planner.steps import Group, Step
from pymerge.planner.tokens import align
from pymerge.planner.workers import Target, worker_of

DEFAULT_SHARD_BYTES = 5_000_000_000
Network = Callable[[Checkpoint, MergeConfig], Collection[str]]


def build_plan(
    config: MergeConfig,
    budget: Budget,
    target: Target | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    planned: Mapping[str, Checkpoint] | None = None,
    network: Network | None = None,
) -> Plan:
    """Plan a merge from the config and the headers of its inputs: a draft (see there), fitted into the budget.

    Raises:
        PlanError: with everything that is wrong: missing, extra or misshapen tensors, dtypes, memory.
        ConfigError, CheckpointError: an input cannot be opened at all.
        ArgumentError: an unknown `dtype`.
    """
    more: dict[str, Any] = {"dtype": dtype, "planned": planned, "network": network}
    draft = draft_plan(config, budget, target, max_shard_bytes=max_shard_bytes, **more)
    return replace(draft, steps=fit(draft.steps, budget))


def draft_plan(
    config: MergeConfig,
    budget: Budget,
    target: Target | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    planned: Mapping[str, Checkpoint] | None = None,
    network: Network | None = None,
) -> Plan:
    """Plan all of a merge but the pieces of its steps, which `fit` cuts as the budget allows.

    Args:
        config: from `load_config`.
        budget: the memory that the merge may use.
        target: where and with what it computes; default: the CPU, automatically.
        max_shard_bytes: size above which a new output file is started.
        dtype: output dtype ("float32", ...), instead of the config's.
        planned: models, by their names in the config, that will be written before the merge runs (`Plan.checkpoint`).
        network: names the weights of a donor that are merged by the inputs which its network has on data; None where
            nobody runs it.

    Raises:
        PlanError, ConfigError, CheckpointError, ArgumentError: as `build_plan`, but for the memory.
    """
    target = target or Target()
    method = get_method(config.merge_method).given(config.base_model is not None)
    assembly = None
    if config.slices or config.modules:
        from pymerge.planner.assemble import arrange

        assembly = arrange(config, method, planned)
    inputs = assembly.inputs if assembly else open_inputs(config, method, planned)
    problems: list[str] = []
    donor = inputs.donor
    if method.needs_data:
        if network is None:
            raise PlanError(
                [
                    f"{config.name}: {method.name} runs models over data as it merges, which pymerge merge and "
                    "pymerge.merge do, of a config by itself; merge by these"
                ]
            )
        method = method.seeing(network(donor, config))
    described = {name: (entry.dtype, entry.shape) for name, entry in donor.tensors.items()}
    roles = classify(described, donor.config, config.rules)
    said = list(beside_warnings(inputs))
    modules = match_modules(inputs, config, method, problems, said)
    known = [*roles, *(module.full_name(name) for module in modules for name in module.roles)]
    problems += [
        f"{config.name}: layers: pattern {pattern!r} finds no tensor of {donor.path}; correct or delete it"
        for pattern in unused_rules(known, config.rules)
    ]
    matched = assembly.match(roles, problems) if assembly else match_tensors(inputs, roles, config, method, problems)
    if not problems:
        check_integers(matched, roles, config.rules, problems, matched.warnings)
    if problems:
        raise PlanError(problems)
    names, warnings = matched.names, matched.warnings
    warnings += said
    aligned = align(matched, roles, config, method)
    inputs, tokens = aligned.inputs, aligned.tokens
    stored, donor = donor, inputs.donor  # gathered tables may have a wider dtype
    main = FolderInputs(donor.folder, inputs, names, roles, aligned.sections)
    whole = joined(main, modules)

    wanted = dtype or config.out_dtype or config.dtype
    if wanted is not None and wanted not in MERGED:
        raise ArgumentError(f"unknown dtype {wanted!r}; choose one of {', '.join(MERGED)}")
    constants = find_constants(inputs, names, roles, aligned.sections)
    warnings += differing(constants, donor.path)
    dtypes = output_dtypes(stored, names, roles, constants, wanted, warnings, keep_float32=config.keep_float32)
    config_json = _config_json(donor, wanted, tokens.config)
    warnings += check_configs(aligned, roles, config, config_json)
    placed = layout_shards(
        [(name, dtypes[name], donor.tensors[name].shape) for name in names],
        max_shard_bytes,
        stem=main.full_name(donor.stem),
    )
    constants = {main.full_name(name): constant for name, constant in constants.items()}
    placed_modules = tuple(_placed_module(module, constants, wanted, warnings, config) for module in modules)
    steps = _steps(method, whole, (*placed, *placed_modules), constants)
    return Plan(
        config=config,
        method=method,
        inputs=replace(inputs, grams=_beside(method, steps, config)),
        steps=tuple(_assigned(steps, config, target, whole.sections)),
        layouts=placed,
        modules=placed_modules,
        warnings=(
            *config.warnings,
            *warnings,
            *remarks((step.name, step.action) for step in steps),
            *remarks_on_grams(method, steps),
        ),
        budget=budget,
        config_json=config_json,
        dtype=wanted,
        base_parameters=sum(whole.tensors[name].numel for name in whole.names),
        tokens=tokens,
        target=target,
        carried=inputs.carried if donor.stamps else {},
    )


def _beside(method: Method, steps: Sequence[Step], config: MergeConfig) -> dict[Path, tuple[int, int]]:
    """Size and time of the files of data, or of what was collected from them."""
    return stamps_of_data(steps, config) if method.needs_data else stamps_of(step.action for step in steps)


def _steps(
    method: Method, whole: Whole, layouts: Iterable[ShardLayout], constants: Mapping[str, Constant]
) -> list[Step]:
    """The steps of all output tensors, in the order of their files. Raises PlanError with all mistakes."""
    steps: list[Step] = []
    wrong: dict[str, list[str]] = {}  # the same mistake is often made for many tensors
    for shard in layouts:
        for tensor in shard.tensors:
            name = full_name(shard.file, tensor.name)
            role, entry = whole.roles[name], whole.tensors[name]
            try:
                found = decide(whole.sections[name], method, name, role, entry, constants.get(name))
                cut = rows_of(entry, found.experts)
                actions = [
                    routed(found.action, found.role, rows.base, rows.experts) if rows.experts else copy()
                    for rows in cut
                ]
            except (ArgumentError, ConfigError) as error:
                wrong.setdefault(str(error), []).append(name)
                continue
            role, constant = found.role, constants.get(name)
            for rows, action in zip(cut, actions, strict=True):
                nbytes = math.prod(rows.base.shape) * ITEM_SIZES[tensor.dtype]
                steps.append(
                    Step(
                        name=name,
                        role=role,
                        action=action,
                        shape=rows.base.shape,
                        dtype=tensor.dtype,
                        base=rows.base,
                        experts=rows.experts,
                        reads_base=found.reads_base or copies(action),
                        file=shard.file,
                        offset=tensor.offset + (tensor.nbytes - nbytes if rows.start else 0),
                        nbytes=nbytes,
                        pieces=tuple(pieces.split(role, action, rows.base.shape, CHUNK_ELEMENTS)),
                        values=found.values,
                        infinite=constant.infinite if constant is not None else 0,
                    )
                )
    if wrong:
        raise PlanError(f"{listed(names)}: {message}" for message, names in wrong.items())
    return steps


def _assigned(
    steps: Sequence[Step], config: MergeConfig, target: Target, sections: Mapping[str, Section]
) -> list[Step]:
    """The steps with their workers, and those that are reduced together in groups; empty tensors are in none.

    A group is in the order of its names, whatever the order in files: of equal elements the first are taken. Actions of
    reductions are those for the dtypes of their inputs, of a group for all.
    """
    assembled = bool(config.slices or config.modules)  # otherwise all is merged from the same models, in all folders
    groups: dict[tuple[int, Reduce], list[Step]] = {}
    for step in steps:
        if isinstance(step.action, Reduce) and step.action.scope == "model" and 0 not in step.shape:
            groups.setdefault((id(sections[step.name]) if assembled else 0, step.action), []).append(step)
    found: dict[int, Step] = {}
    for number, ((_, action), unordered) in enumerate(groups.items()):
        together = sorted(unordered, key=lambda step: step.name)  # stable: rows of one tensor keep their order
        first, numel = 0, sum(math.prod(step.shape) for step in together)
        known = action.on(*(entry.dtype for step in together for entry in step.inputs))
        for step in together:
            found[id(step)] = replace(step, action=known, group=Group(number, numel, first))
            first += math.prod(step.shape)
    for step in steps:
        if isinstance(step.action, Reduce) and id(step) not in found:
            known = step.action.on(*(entry.dtype for entry in step.inputs))
            found[id(step)] = replace(step, action=known)
    assigned = [found.get(id(step), step) for step in steps]
    with_others = with_layers(assigned, lambda step: id(sections[step.name]) if assembled else 0)
    return [replace(step, worker=worker_of(step, target)) for step in with_others]


def _placed_module(
    module: FolderInputs, constants: dict[str, Constant], wanted: str | None, warnings: list[str], config: MergeConfig
) -> ShardLayout:
    """The one file of a module, under the name that sentence-transformers looks for; its constants are added."""
    donor = module.inputs.donor
    own = find_constants(module.inputs, module.names, module.roles, module.sections)
    keep = config.keep_float32
    dtypes = output_dtypes(donor, module.names, module.roles, own, wanted, warnings, keep_float32=keep)
    constants |= {module.full_name(name): constant for name, constant in own.items()}
    described = [(name, dtypes[name], donor.tensors[name].shape) for name in module.names]
    return layout_file(module.full_name("model.safetensors"), described)


def _config_json(donor: Checkpoint, wanted: str | None, keys: Mapping[str, Any]) -> bytes | None:
    """The donor's config.json; its dtypes follow the output, and so do `keys`, in the config or in its text_config,
    whichever has them."""
    if not donor.config:
        return None
    config = {key: value for key, value in with_dtype(donor.config, wanted).items() if key != "transformers_weights"}
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config["text_config"] = {**nested, **{key: value for key, value in keys.items() if key in nested}}
        keys = {key: value for key, value in keys.items() if key in config or key not in nested}
    config |= keys
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
