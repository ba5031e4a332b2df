"""Models of a pool as names of files, for merges that need not load them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.utils import import_object
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoModelForCausalLM

from pymerge.common.dtypes import code_of, is_float
from pymerge.planner.plan import Plan

BASE = "_pretrained_"
_PATH, _TARGET, _LOADER = "pretrained_model_name_or_path", "_target_", ".from_pretrained"
_DTYPES = ("torch_dtype", "dtype")
# Arguments of from_pretrained that change nothing of a model's values.
_HARMLESS = {
    "attn_implementation", "cache_dir", "device_map", "local_files_only", "low_cpu_mem_usage", "token",
    "trust_remote_code", "use_cache", "use_safetensors", *_DTYPES,
}  # fmt: skip


class NotInFiles(Exception):
    """Why a pool cannot be merged from files."""


@dataclass(frozen=True)
class Files:
    """Names of models as configs of merges have them, and the dtype in which the pool loads them (None: their own)."""

    models: Mapping[str, str]
    dtype: torch.dtype | None


def files_of(pool: Any) -> Files:
    """The models of a pool in files. Raises NotInFiles for pools, or models, that are something else when loaded."""
    if type(pool) is not CausalLMPool:
        raise NotInFiles(f"{type(pool).__name__} loads other tensors than its models' files have")
    names = [*([BASE] if pool.has_pretrained else []), *pool.model_names]
    dtypes = set()
    models = {}
    for name in names:
        entry = _entry(pool, name)
        path = entry.pop(_PATH, None)
        if not isinstance(path, str):
            raise NotInFiles(f"model {name!r} is given by no path")
        revision = entry.pop("revision", None)
        entry.pop(_TARGET, None)
        said = {key: value for key, value in {**entry, **pool.get_model_kwargs()}.items() if value is not None}
        if odd := sorted(said.keys() - _HARMLESS):
            raise NotInFiles(f"model {name!r} is loaded with {', '.join(odd)}")
        dtypes.add(next((str(said[key]).removeprefix("torch.") for key in _DTYPES if key in said), "auto"))
        models[name] = f"{path}@{revision}" if revision else path
    if len(dtypes) > 1:
        raise NotInFiles(f"its models are loaded in several dtypes ({', '.join(sorted(dtypes))})")
    dtype = next(iter(dtypes), "auto")
    return Files(models, None if dtype == "auto" else getattr(torch, dtype))


def check_dtype(files: Files, plan: Plan) -> None:
    """Raise NotInFiles if the files have another dtype than that in which the pool loads them."""
    if files.dtype is None:
        return
    wanted = code_of(files.dtype)
    for model in plan.inputs.all:
        others = {each.dtype for each in model.tensors.values() if is_float(each.dtype)} - {wanted}
        if others:
            raise NotInFiles(f"it loads {model.path} as {wanted}, and its files have {', '.join(sorted(others))}")


def load(pool: Any, name: str, path: str | None = None) -> nn.Module:
    """A model of a pool as a module, also of a pool that loads lazily; from another `path` if one is given."""
    if type(pool) is not CausalLMPool:
        found: nn.Module = pool.load_model(name)
        return found
    entry = pool._models[name]
    if isinstance(entry, nn.Module):
        return entry
    said = {**_entry(pool, name), **pool.get_model_kwargs()}
    target, own = str(said.pop(_TARGET)), said.pop(_PATH)
    loader: Any = import_object(target.removesuffix(_LOADER))
    if not hasattr(loader, _LOADER.lstrip(".")):
        loaded: nn.Module = import_object(target)(path or own, **said)
        return loaded
    if path is not None:
        said.pop("revision", None)
    model: nn.Module = loader.from_pretrained(path or own, **said)
    return model


def _entry(pool: Any, name: str) -> dict[str, Any]:
    """A model's config as a mapping, a copy: its loader, path and arguments."""
    entry = pool._models[name]
    if isinstance(entry, str):
        return {_TARGET: f"transformers.{AutoModelForCausalLM.__name__}", _PATH: entry}
    if isinstance(entry, DictConfig):
        entry = OmegaConf.to_container(entry, resolve=True)
    return dict(entry) if isinstance(entry, Mapping) else {}
