"""mergekit's options of a merge, and what each of them is here. Needs no mergekit."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pymerge.config.document import Document
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.planner.plan import Plan
from pymerge.tokenizers.files import is_tokenizer_file

# The copy of the config that mergekit leaves beside the weights, and that its tools look for.
RECIPE = "mergekit_config.yml"
MODEL_CARD = "README.md"
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Options:
    """Names and defaults are mergekit's. What is not mentioned in this module has nothing to do here."""

    allow_crimes: bool = False
    unsafe_truncate_embeddings: bool = False
    transformers_cache: str | None = None
    lora_merge_cache: str | None = None
    lora_merge_dtype: str | None = None
    cuda: bool = False
    device: str | None = None
    low_cpu_memory: bool = False
    out_shard_size: int = 5_000_000_000
    copy_tokenizer: bool = True
    clone_tensors: bool = False
    trust_remote_code: bool = False
    random_seed: int | None = None
    lazy_unpickle: bool = False
    write_model_card: bool = True
    safe_serialization: bool = True
    verbosity: int = 0
    quiet: bool = False
    read_to_gpu: bool = False
    multi_gpu: bool = False
    num_threads: int | None = None
    gpu_rich: bool = False
    async_write: bool = False
    write_threads: int = 1

    def __post_init__(self) -> None:
        if not self.safe_serialization:
            raise ArgumentError(
                "safe_serialization is false, and pymerge writes safetensors only; leave --no-safe-serialization out"
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise ArgumentError(f"num_threads is {self.num_threads}; give at least 1")

    @property
    def where(self) -> str:
        """The device that computes: mergekit's default is the CPU."""
        return self.device or ("cuda" if self.cuda or self.gpu_rich else "cpu")

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each option that is asked for and changes nothing, where that could be missed."""
        reasons = {
            "trust_remote_code": "no code of a model is run",
            "allow_crimes": "tensors are matched by name and shape, whatever the architecture",
            "lora_merge_dtype": "adapters are applied in float32",
            "multi_gpu": "one device computes a merge",
        }
        asked = [name for name in reasons if getattr(self, name) or (name == "multi_gpu" and self.gpu_rich)]
        found = [f"{name} has no effect: {reasons[name]}" for name in asked]
        if self.unsafe_truncate_embeddings:
            found.append(
                "unsafe_truncate_embeddings is 'vocabulary: base' here: rows that all models have are merged, and "
                "further ones of the base are kept, not discarded"
            )
        return tuple(found)

    def adjust(self, document: Document) -> None:
        """Write into a config what options say, and what mergekit does that pymerge does otherwise."""
        data = document.data
        if not isinstance(data, dict):
            return
        before = copy.deepcopy(data)
        method = METHODS[data["merge_method"]] if data.get("merge_method") in METHODS else None
        if self.random_seed is not None and method and any(p.name == "random_seed" for p in method.parameters):
            data["random_seed"] = self.random_seed
            if isinstance(data.get("parameters"), dict):
                data["parameters"] = {k: v for k, v in data["parameters"].items() if k != "random_seed"}
        if method and not method.given(True).needs_base:
            _list_base(data)
        tokenizer = data.get("tokenizer")
        if data.get("tokenizer_source") is not None and tokenizer is None:
            tokenizer = {"source": data.pop("tokenizer_source")}
            _move(document, "tokenizer_source", "tokenizer")
        if isinstance(tokenizer, dict) and tokenizer.get("pad_to_multiple_of") is None:
            data["tokenizer"] = {**tokenizer, "pad_to_multiple_of": 1}  # as many rows as tokens
        elif tokenizer is None and self.unsafe_truncate_embeddings:
            data.setdefault("vocabulary", "base")
        if data != before:
            document.text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    @property
    def shard_bytes(self) -> int:
        """Bytes above which a new file is started; mergekit's 0 is no limit."""
        return self.out_shard_size if self.out_shard_size > 0 else NO_LIMIT

    def fit(self, plan: Plan, recipe: bytes) -> Plan:
        """A plan with the files, the threads and the warnings of these options."""
        given: dict[str, bytes | None] = {RECIPE: recipe}
        if not self.write_model_card:
            given = {RECIPE: None, MODEL_CARD: None}
        warnings = self.warnings
        if not self.copy_tokenizer and plan.config.tokenizer is None:
            names = {*map(Path, plan.tokens.files), *plan.inputs.donor.other_files}
            given |= {name.as_posix(): None for name in names if is_tokenizer_file(name)}
            if plan.config.chat_template is not None:
                warnings += ("chat_template is not written: copy_tokenizer is false",)
        target = plan.target if self.num_threads is None else replace(plan.target, threads=self.num_threads)
        return replace(plan, given=given, target=target, warnings=(*plan.warnings, *warnings))

    @contextmanager
    def hub_cache(self) -> Iterator[None]:
        """Models of the Hub are looked for, and downloaded, in `transformers_cache` if that is given."""
        if self.transformers_cache is None:
            yield
            return
        from huggingface_hub import constants

        before: Any = constants.HF_HUB_CACHE
        constants.HF_HUB_CACHE = os.path.expanduser(self.transformers_cache)
        try:
            yield
        finally:
            constants.HF_HUB_CACHE = before


def _list_base(data: dict[str, Any]) -> None:
    """mergekit merges a base that its method does not use as a model like the others, also where it is not listed."""
    base, modules = data.get("base_model"), data.get("modules")
    for owner in (data, *(modules.values() if isinstance(modules, dict) else ())):
        models = owner.get("models") if isinstance(owner, dict) else None
        if base is None or not isinstance(models, list):
            continue
        if not any(isinstance(entry, dict) and entry.get("model") == base for entry in models):
            owner["models"] = [*models, {"model": base}]


def _move(document: Document, key: str, into: str) -> None:
    """Messages about `into` have the line of `key`, which stood for it."""
    if (key,) in document.lines:
        document.lines[into,] = document.lines[key,]
