"""Plans of merges of live adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge import env
from pymerge.common.units import parse_bytes
from pymerge.config.merge_config import load_config
from pymerge.engine.run import resolve_target
from pymerge.errors import ArgumentError
from pymerge.integrations.peft.live import BASE, Live, read_adapters
from pymerge.methods import get_method
from pymerge.planner.budget import budget
from pymerge.planner.build import build_plan
from pymerge.planner.plan import Plan


def plan_adapters(
    live: Live,
    names: Sequence[str],
    method: str,
    weights: Sequence[float] | Mapping[str, float] | None,
    parameters: Mapping[str, Any],
    *,
    device: Any = "cpu",
    memory: int | str | None = None,
    dtype: str | None = None,
) -> Plan:
    """The plan of a merge of adapters of a live model: the same as that of their files.

    Raises:
        ArgumentError: adapters, weights or parameters that the model or the method does not have.
        ConfigError, PlanError, CheckpointError: as for files.
    """
    adapters = read_adapters(live, names)
    config = load_config(_config(list(adapters), names, method, weights, parameters))
    target = resolve_target(device, env.default_backend())
    limit = budget(target.device, None if memory is None else parse_bytes(memory))
    return build_plan(config, limit, target, dtype=dtype, planned={BASE: live.base, **adapters})


def _config(
    models: Sequence[str],
    names: Sequence[str],
    method: str,
    weights: Sequence[float] | Mapping[str, float] | None,
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    found = get_method(method)
    known = {parameter.name: parameter for parameter in found.all_parameters}
    own: list[dict[str, Any]] = [{} for _ in names]
    given = {key.rstrip("_"): value for key, value in parameters.items()}
    if weights is not None:
        given["weight"] = _by_name(weights, names)
    required = found.required({key: (value,) for key, value in given.items()})
    shared = {parameter.name: parameter.default for parameter in required}
    for key, value in given.items():
        if key in known and known[key].scope == "model" and isinstance(value, (list, tuple)):
            if len(value) != len(names):
                raise ArgumentError(f"{key} has {len(value)} values for {len(names)} adapters; give one for each")
            for each, one in zip(own, value, strict=True):
                each[key] = one
        else:
            shared[key] = value
    entries = [{"model": model, "parameters": each} for model, each in zip(models, own, strict=True)]
    return {"merge_method": method, "base_model": BASE, "models": entries, "parameters": shared}


def _by_name(weights: Sequence[float] | Mapping[str, float], names: Sequence[str]) -> list[float]:
    if not isinstance(weights, Mapping):
        return list(weights)
    if weights.keys() != set(names):
        raise ArgumentError(
            f"weights are for {', '.join(weights)}, the adapters are {', '.join(names)}; give one for each"
        )
    return [weights[name] for name in names]
