"""The algorithm that FusionBench runs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.models.utils import get_target_state_dict, validate_target_modules_equal
from hydra.core.hydra_config import HydraConfig
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from torch import Tensor, nn

from pymerge import api
from pymerge.common.names import nearest
from pymerge.common.units import format_bytes, parse_bytes
from pymerge.errors import ArgumentError
from pymerge.integrations.fusion_bench.files import BASE, Files, NotInFiles, check_dtype, files_of, load
from pymerge.live.merger import Merger
from pymerge.methods import get_method
from pymerge.methods.base import Method
from pymerge.planner.plan import Plan

log = logging.getLogger(__name__)
_WEIGHT = "weight"


@auto_register_config
class Merge(LightningFabricMixin, BaseAlgorithm):
    """A merge of all models of a pool, by any method of pymerge.

    Models that a pool would load from files as they are (CausalLMPool) are merged in these, in bounded memory; those of
    other pools are loaded, and merged into the base, tensor by tensor.

    Args:
        merge_method: a name of `pymerge methods`.
        parameters: the method's, by name; of those that each model has a number, a list in the pool's order, or a
            mapping by the models' names.
        weights: the parameter `weight` of each model, in the same forms.
        stream: merge from files: True, False, or "auto".
        out_dir: folder of a streamed merge; default: merged in the folder of Hydra's run.
        memory: limit for what is held at once, as in `pymerge.merge`; a merge in memory, which holds all models, is
            refused where they are more than that.
        device: where to compute: "auto", "cpu", "cuda", "cuda:N".
        evaluate: load a streamed merge, so that it goes on; False: it stays in `out_dir`, and nothing is evaluated.
    """

    def __init__(
        self,
        merge_method: str,
        parameters: Mapping[str, Any] | None = None,
        weights: float | Sequence[float] | Mapping[str, float] | None = None,
        stream: bool | str = "auto",
        out_dir: str | None = None,
        memory: int | str | None = None,
        device: str = "auto",
        evaluate: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> nn.Module | None:
        """The merged model; None where it stays in files.

        Raises PymergeError, one of its subclasses, for models and parameters that do not fit together.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        if self.stream not in ("auto", True, False):
            raise ArgumentError(f"stream is {self.stream!r}; choose auto, true or false")
        method = get_method(self.merge_method).given(pool.has_pretrained)
        if method.needs_base and not pool.has_pretrained:
            raise ArgumentError(f"{method.name!r} works on differences to a base; name it {BASE} in the model pool")
        parameters = self._parameters(method, list(pool.model_names))
        if self.stream is not False:
            try:
                files = files_of(pool)
                plan = self._plan(files, parameters, method)
                if self.stream is not True:
                    check_dtype(files, plan)
            except NotInFiles as reason:
                if self.stream is True:
                    raise ArgumentError(f"stream is true, and {reason}; set stream: false") from None
                log.info("merging in memory: %s", reason)
            else:
                return self._streamed(pool, plan)
        if not self.evaluate:
            raise ArgumentError("evaluate is false, and nothing is left of a merge in memory; set stream: true")
        return self._in_memory(pool, method, parameters)

    def _parameters(self, method: Method, names: list[str]) -> dict[str, Any]:
        """All parameters that are given; those of each model as lists in the pool's order."""
        given = dict(_plain(self.parameters) or {})
        known = {each.name: each for each in method.all_parameters}
        if self.weights is not None:
            if _WEIGHT not in known:
                raise ArgumentError(f"method {method.name!r} has no weights; delete weights")
            given[_WEIGHT] = _plain(self.weights)
        for name, value in given.items():
            if name in known and known[name].scope == "model" and isinstance(value, (Mapping, list)):
                given[name] = _in_order(name, value, names)
        return given

    def _plan(self, files: Files, parameters: Mapping[str, Any], method: Method) -> Plan:
        """The plan of a merge of files."""
        of_models = {each.name for each in method.parameters if each.scope == "model"}
        lists = {name: value for name, value in parameters.items() if name in of_models and isinstance(value, list)}
        given = {name: (value,) for name, value in parameters.items()}
        required = {each.name: each.default for each in method.required(given)}
        names = [name for name in files.models if name != BASE]
        config: dict[str, Any] = {
            "merge_method": method.name,
            "models": [
                {"model": files.models[name], "parameters": {key: value[at] for key, value in lists.items()}}
                for at, name in enumerate(names)
            ],
            "parameters": {key: value for key, value in {**required, **parameters}.items() if key not in lists},
        }
        if BASE in files.models:
            config["base_model"] = files.models[BASE]
        if files.dtype is not None:
            config["dtype"] = str(files.dtype).removeprefix("torch.")
        return api.plan(config, device=self.device, memory=self.memory)

    def _streamed(self, pool: Any, plan: Plan) -> nn.Module | None:
        out = self._out()
        if rank_zero_only.rank == 0:  # one process writes
            out.parent.mkdir(parents=True, exist_ok=True)
            api.run(plan, out, progress=False)
        self._wait()
        if not self.evaluate:
            return None
        return load(pool, BASE if pool.has_pretrained else pool.model_names[0], str(out))

    def _out(self) -> Path:
        if self.out_dir is not None:
            return Path(self.out_dir).expanduser()
        if not HydraConfig.initialized():
            raise ArgumentError(
                "out_dir is not given, and there is no run with a folder; set out_dir, or stream: false"
            )
        return Path(HydraConfig.get().runtime.output_dir, "merged")

    def _wait(self) -> None:
        fabric = self._fabric_instance
        if fabric is not None:
            fabric.barrier()

    def _in_memory(self, pool: Any, method: Method, parameters: Mapping[str, Any]) -> nn.Module:
        """Load all models, and overwrite the base, or where there is none the first of them."""
        own = load(pool, BASE if pool.has_pretrained else pool.model_names[0])
        if not isinstance(own, nn.Module):
            raise ArgumentError(f"{type(pool).__name__} gives a {type(own).__name__}, and no module to merge into")
        self._check_memory(own, len(pool.model_names) + 1)
        merged = copy.deepcopy(own) if pool.has_instance_models else own
        experts = [load(pool, name) for name in pool.model_names]
        modules = [each for each in (merged, *experts) if isinstance(each, nn.Module)]
        validate_target_modules_equal(modules)
        only_some = getattr(merged, "_fusion_bench_target_modules", None) is not None
        sources = [get_target_state_dict(each) if only_some else _source(each) for each in experts]
        target = get_target_state_dict(merged, keep_vars=True) if only_some else merged
        device = None if self.device == "auto" else self.device
        if device is None and self._fabric_instance is not None and self._fabric_instance.device.type == "cuda":
            device = str(self._fabric_instance.device)
        merger = Merger(
            target if pool.has_pretrained else None, sources, method.name, device=device, cache="none", **parameters
        )
        merger.merge_into(target)
        return merged

    def _check_memory(self, model: nn.Module, count: int) -> None:
        """Refuse to load so many models as large as this one if they are more than `memory`."""
        if self.memory is None:
            return
        limit = parse_bytes(self.memory)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        if count * size > limit:
            raise ArgumentError(
                f"memory is {format_bytes(limit)}, and a merge in memory holds {count} models of {format_bytes(size)}; "
                f"give memory: {count * size} or more, or leave it out; models in files are merged in less from a "
                "CausalLMPool with stream: true, or by pymerge merge"
            )


def _source(model: Any) -> nn.Module | dict[str, Tensor]:
    """A model as pymerge takes it: lazy state dicts are read."""
    return model if isinstance(model, nn.Module) else dict(model)


def _in_order(name: str, values: Mapping[str, Any] | list[Any], models: Sequence[str]) -> list[Any]:
    """A value of each model, in the pool's order."""
    if isinstance(values, list):
        if len(values) != len(models):
            raise ArgumentError(
                f"{name} has {len(values)} values for {len(models)} models ({', '.join(models)}); give one for each"
            )
        return values
    for model in values:
        if model not in models:
            near = nearest(str(model), models)
            hint = f"did you mean {near!r}?" if near else f"the pool has {', '.join(models)}"
            raise ArgumentError(f"{name}: the pool has no model {model!r}; {hint}")
    missing = [model for model in models if model not in values]
    if missing:
        raise ArgumentError(f"{name} has no value for {', '.join(missing)}; give one for each model")
    return [values[model] for model in models]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
