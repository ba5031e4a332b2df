"""A merge of live adapters as a further adapter of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pymerge.common.progress import NoProgress
from pymerge.errors import ArgumentError
from pymerge.extraction.carry_out import carry_out
from pymerge.extraction.merged import plan_merge
from pymerge.integrations.peft.live import Live
from pymerge.integrations.peft.merging import plan_adapters
from pymerge.output.adapter_folder import CONFIG_NAME, PREFIX, WEIGHTS_NAME

# What becomes of tensors that have no factors, in the words of merges of folders: here nothing is saved.
_FULL_TENSORS = {"error": "error", "merge": "save", "save": "save", "skip": "skip"}
# A row that differs by less, as a share of each value, is the base's: an average of equal values.
_ROUNDING = 4 * 2.0**-23


@dataclass(frozen=True)
class MergedAdapter:
    """A new adapter: for each of its modules its rank, and the share of the squared norm of the merge that it lacks."""

    name: str
    ranks: Mapping[str, int]
    lost: Mapping[str, float]
    warnings: tuple[str, ...] = ()


def add_merged_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    adapter_name: str,
    method: str = "task_arithmetic",
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rank: int | float | str = "exact",
    full_tensors: str = "error",
    device: str | torch.device = "cpu",
    memory: int | str | None = None,
    **parameters: Any,
) -> MergedAdapter:
    """Merge adapters of a live model into a new adapter of it, as `pymerge.merge_adapters` does with their folders.

    It is not activated: call `model.set_adapter(adapter_name)`. Its factors are float32, frozen, with every scale 1.

    Args:
        model: a PeftModel, or any module with layers of PEFT's LoRA in it.
        adapters: names of adapters of the model, at least one.
        adapter_name: of the new one.
        method: a name of `pymerge methods`.
        weights: the method's weight of each adapter, in their order or by their names.
        rank: "exact" (the sum of all ranks), a largest rank, or below 1 the share of the sum of s^2 that is kept.
        full_tensors: what becomes of tensors that adapters have no factors of (modules_to_save, trained tokens,
            biases): "error"; "merge", or "save" as folders have it: they are merged as tensors; "skip": the new adapter
            has the model's own.
        device: where merges that are no products of factors compute.
        memory: limit for what is held at once, as of `pymerge.merge`.
        parameters: the method's; for one with a value for each model, a number or a sequence of numbers.

    Raises:
        PlanError: a merged tensor is not of low rank, and no lower rank is asked for.
        PymergeError: another of its subclasses. The model is then as it was.
    """
    live = Live(model)
    _check_name(adapter_name, live)
    if full_tensors not in _FULL_TENSORS:
        raise ArgumentError(f"full_tensors is {full_tensors!r}; choose one of {', '.join(_FULL_TENSORS)}")
    if full_tensors != "skip":
        live.check_biases(
            adapters,
            "give full_tensors='skip', which leaves them as they are, or merge the weights (merge_adapters_into) or "
            "the folders of the adapters (pymerge.merge_adapters)",
        )
    plan = plan_adapters(live, adapters, method, weights, parameters, device=device, memory=memory, dtype="float32")
    work = plan_merge(plan, rank=str(rank), full_tensors=_FULL_TENSORS[full_tensors], dtype="float32")
    with TemporaryDirectory(prefix="pymerge-") as folder:
        report = carry_out(work, Path(folder, "adapter"), NoProgress(), overwrite=False)
        said = json.loads(Path(folder, "adapter", CONFIG_NAME).read_bytes())
        tensors = load_file(Path(folder, "adapter", WEIGHTS_NAME))
    _with_tokens(live, adapters, said, tensors)
    _add(live, adapter_name, said, tensors)
    adapted = {each.name.removesuffix(".weight"): each for each in report.tensors if each.place == "factors"}
    ranks = {path: each.rank for path, each in adapted.items()}
    return MergedAdapter(adapter_name, ranks, {path: each.error**2 for path, each in adapted.items()}, plan.warnings)


def _check_name(name: str, live: Live) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ArgumentError(f"adapter_name is {name!r}; give a name without dots")
    if name in live.configs:
        raise ArgumentError(f"the model has an adapter {name!r} already; give another name, or delete_adapter it")


def _with_tokens(live: Live, adapters: Sequence[str], said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Have tables that adapters train in some rows alone in the new adapter so, too: PEFT has no other form for them
    beside those."""
    for path, rows in live.trained_rows(adapters).items():
        table = tensors.pop(f"{PREFIX}{path}.weight", None)
        if table is None:
            continue
        base = live.parameters[f"{path}.weight"].detach().to("cpu", torch.float32)
        others = torch.ones(len(table), dtype=torch.bool)
        others[rows] = False
        if bool(((table - base)[others].abs() > _ROUNDING * base[others].abs()).any()):
            raise ArgumentError(
                f"{path}: the merge changes more rows than adapters have trained (trainable_token_indices), for which "
                "PEFT has no form in this model; give full_tensors='skip', or merge the folders of the adapters"
            )
        tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = table[rows]
        said["trainable_token_indices"] = {**(said.get("trainable_token_indices") or {}), path: rows}
        gone = {path, "lm_head"} if live.ties else {path}  # a head that is tied is the table once more
        for module in gone:
            tensors.pop(f"{PREFIX}{module}.weight", None)
        said["modules_to_save"] = [module for module in said["modules_to_save"] or () if module not in gone] or None


def _add(live: Live, name: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Have PEFT make an adapter, and fill it. Whatever fails, none is left."""
    import peft

    if said["bias"] != "none":
        raise ArgumentError(
            "some adapters have biases (lora_bias) and others adapt modules without one: PEFT has no form for that in "
            "a live model; give full_tensors='skip', or merge their folders with pymerge.merge_adapters"
        )
    fields = {key: value for key, value in said.items() if key not in ("peft_type", "base_model_name_or_path")}
    # PEFT ties head and table of the first adapter alone: those of others are two.
    if fields.pop("ensure_weight_tying") and f"{PREFIX}lm_head.weight" in tensors:
        fields["modules_to_save"] = [*fields["modules_to_save"], "lm_head"]
    fields["target_parameters"] = _as_others_have(fields["target_parameters"], live)
    config = peft.LoraConfig(**fields)
    model = live.model
    before = {id(parameter) for parameter in model.parameters()}
    with _unchanged(model):
        try:
            if isinstance(model, peft.PeftModel):
                peft.PeftModel.add_adapter(model, name, config)
            else:
                peft.inject_adapter_in_model(config, model, name)
            _fill(live, name, tensors)
        except BaseException:
            _remove(live, name)
            raise
    for parameter in model.parameters():
        if id(parameter) not in before:
            parameter.requires_grad_(False)


def _as_others_have(parameters: Sequence[str] | None, live: Live) -> list[str] | None:
    """Parameters as other adapters name them, if these name the same: PEFT wants one spelling in all of them."""
    for config in live.configs.values():
        others = sorted(getattr(config, "target_parameters", None) or ())
        ends = [tuple(path for path in parameters or () if f".{path}".endswith(f".{other}")) for other in others]
        if others and all(ends) and {path for paths in ends for path in paths} == set(parameters or ()):
            return others
    return list(parameters) if parameters else None


def _fill(live: Live, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy the values of an adapter, which must have places for just these."""
    own = dict(Live(live.model).tensors(name))
    wanted = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    if own.keys() != wanted.keys():
        odd = sorted(own.keys() ^ wanted.keys())
        raise ArgumentError(
            f"PEFT makes other modules of the new adapter than it should have ({', '.join(odd[:3])}); "
            "merge the folders of the adapters with pymerge.merge_adapters"
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            own[key].copy_(tensor.view(own[key].shape))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back which adapters are active, and what is trained: PEFT may change both when it adds one."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [module for module in model.modules() if "_active_adapter" in vars(module)]
    active = [(module, vars(module)["_active_adapter"]) for module in modules]
    try:
        yield
    finally:
        for module, value in active:
            vars(module)["_active_adapter"] = value
        for parameter, value in trained:
            parameter.requires_grad_(value)


def _remove(live: Live, name: str) -> None:
    """Take away what PEFT has made of an adapter so far."""
    for module in list(live.model.modules()):
        if hasattr(module, "delete_adapter") and "_active_adapter" in vars(module):
            for part in getattr(module, "adapter_layer_names", ()) + getattr(module, "other_param_names", ()):
                found = getattr(module, part, None)
                if isinstance(found, (dict, nn.ModuleDict, nn.ParameterDict)) and name in found:
                    del found[name]
    getattr(live.model, "peft_config", {}).pop(name, None)
