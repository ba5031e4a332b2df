"""Content of an adapter folder: what was measured, put together under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.common.dtypes import is_float
from pymerge.common.names import listed
from pymerge.errors import PlanError
from pymerge.extraction.measure import Measured
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.targets import TensorPair
from pymerge.extraction.tensors import Factor, Stored
from pymerge.extraction.tied import TiedHead
from pymerge.output.adapter_folder import (
    Adapted,
    Bias,
    adapter_config,
    bias_name,
    replaced,
    saved_name,
    task_type,
    vllm_note,
)
from pymerge.planner.plan import Plan


@dataclass(frozen=True)
class Content:
    """Content of an adapter: tensors by their names, the config, and whether there are factors alone."""

    adapted: tuple[Adapted, ...]
    tensors: Mapping[str, Factor | Stored]
    config: bytes
    note: str

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(each.rank for each in self.adapted)


def put_together(
    measured: Sequence[Measured[TensorEntry]],
    plan: Plan,
    options: ExtractOptions,
    base: str,
    names: Mapping[str, str],
    head: TiedHead | None,
    experts: Mapping[str, TensorEntry],
) -> Content:
    """The content of the folder.

    Args:
        measured: all targets.
        plan: with the base.
        options: what is asked for.
        base: its name in the config.
        names: of its tensors in memory, by those in files.
        head: that is replaced with its table.
        experts: what becomes of the base's tensors, by their names in files; others stay.

    Raises:
        PlanError: nothing that would get factors has changed, or a module would be adapted and replaced.
    """
    changed = [each for each in measured if each.total > 0]
    biases = [each.target for each in changed if each.target.place == "bias"]
    given = _with_factors(measured, {target.module for target in biases})
    if not any(each.rank for each in given):
        models = plan.inputs.experts
        what = "the merge" if len(models) > 1 else str(models[0].path)
        raise PlanError([f"{what} equals {base} in all that would be adapted; there is nothing to write"])
    rank = max(each.rank for each in given)
    adapted, tensors = [], dict[str, Factor | Stored]()
    for each in given:
        pair = each.target.adapted(rank if each.target.uniform else max(1, each.rank))
        adapted.append(pair)
        tensors |= {
            name: Factor(each, pair.rank, b, options.code) for b, name in zip((False, True), pair.names, strict=True)
        }
    targets = [each.target for each in changed if each.target.place == "saved"]
    loose = _loose(targets)
    bias = _bias(biases, loose, adapted, measured)
    for target in _with_bias(biases, adapted, measured, bias):
        minus = target.base if bias == "lora_bias" else None
        stored = Stored((target.expert,), target.base.shape, options.code, minus)
        tensors[bias_name(target.module, added=minus is not None)] = stored
    tensors |= {saved_name(each.path): Stored((each.expert,), each.base.shape, options.code) for each in loose}
    saved = _saved([each for each in targets if each not in loose], plan, options, names, experts)
    modules = {name.rpartition(".")[0] for name in saved}
    if head is not None and names[head.table] in saved:
        saved[head.weight] = saved[names[head.table]]
    if twice := sorted(modules & {each.module for each in adapted}):
        raise PlanError([f"{listed(twice)}: would be adapted and replaced at once; leave them out with --exclude"])
    tensors |= {saved_name(name): stored for name, stored in saved.items()}
    turned = any(each.target.transposed and each.target.form == "module" for each in given)
    config = adapter_config(
        base,
        adapted,
        names.values(),
        saved=sorted(modules),
        bias=bias,
        fan_in_fan_out=turned,
        task_type=task_type(plan.inputs.donor.config),
        tied=head is not None,
    )
    note = vllm_note(rank, plain=not saved and bias == "none")
    return Content(tuple(adapted), dict(sorted(tensors.items())), config, note)


def _with_factors(measured: Sequence[Measured[TensorEntry]], biased: set[str]) -> list[Measured[TensorEntry]]:
    """Targets that get factors: those that changed, those whose bias alone did, and all of what PEFT stacks."""
    candidates = [each for each in measured if each.target.place == "factors"]
    together = any(each.target.uniform and each.rank for each in candidates)
    return [
        each for each in candidates if each.rank or (each.target.uniform and together) or each.target.module in biased
    ]


def _loose(saved: Sequence[TensorPair]) -> list[TensorPair]:
    """Biases of modules that have changed in nothing else: PEFT need not replace those."""
    weights = {target.module for target in saved if not target.is_bias}
    return [target for target in saved if target.is_bias and target.module not in weights]


def _bias(
    biases: Sequence[TensorPair],
    loose: Sequence[TensorPair],
    adapted: Sequence[Adapted],
    measured: Sequence[Measured[TensorEntry]],
) -> Bias:
    """lora_bias is of all adapted modules, and those without a bias cannot be merged with it."""
    if loose:
        return "all"
    if not biases:
        return "none"
    having = {each.target.module for each in measured if each.target.place == "bias"}
    return "lora_bias" if all(each.form == "module" and each.module in having for each in adapted) else "lora_only"


def _with_bias(
    biases: Sequence[TensorPair], adapted: Sequence[Adapted], measured: Sequence[Measured[TensorEntry]], bias: Bias
) -> list[TensorPair]:
    """Biases that are written: those that have changed, or of all adapted modules."""
    if bias != "lora_bias":
        return list(biases)
    modules = {each.module for each in adapted}
    return [each.target for each in measured if each.target.place == "bias" and each.target.module in modules]


def _saved(
    targets: Sequence[TensorPair],
    plan: Plan,
    options: ExtractOptions,
    names: Mapping[str, str],
    experts: Mapping[str, TensorEntry],
) -> dict[str, Stored]:
    """All tensors of the modules that PEFT replaces for the sake of these, by their names in memory."""
    files = {path: name for name, path in names.items()}
    found = {}
    for paths in replaced({target.module for target in targets}, files).values():
        for path in paths:
            whole = plan.inputs.donor.tensors[files[path]]
            entries: tuple[TensorEntry, ...] = (whole,)
            if found_there := experts.get(files[path]):
                entries = (found_there,)
                if found_there.shape != whole.shape:  # rows beyond those that both have are the base's
                    entries += (whole.rows(found_there.shape[0], whole.shape[0]),)
            code = options.code if is_float(whole.dtype) else whole.dtype
            found[path] = Stored(entries, whole.shape, code)
    return found
