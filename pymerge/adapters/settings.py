"""adapter_config.json of PEFT: scale and rank of each module, and what cannot be read, with the remedy that is true."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymerge.checkpoint.model_files import ADAPTER_CONFIG
from pymerge.common.names import first_few, shorten
from pymerge.errors import CheckpointError

# peft_type: weights stay as they are, or change with each input, so that there is nothing to merge.
_UNMERGED_KINDS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "XLORA", "POLY", "LILY", "SHADOW",
}  # fmt: skip
# peft_type: something is added to weights, which PEFT can turn into factors.
_CONVERTED = {
    "LOHA", "LOKR", "VERA", "RANDLORA", "FOURIERFT", "VBLORA", "MISS", "C3A", "WAVEFT", "DELORA", "GRALORA", "TINYLORA",
    "UNILORA", "PSOFT",
}  # fmt: skip
# Variants of LoRA whose weights are not W + s B A, by their key: what they are.
_VARIANTS = {
    "alora_invocation_tokens": "activated LoRA, which acts from an invocation on and has no merge",
    "arrow_config": "Arrow, which chooses among adapters for each token and has no merge",
    "use_qalora": "QALoRA, whose factors are for groups of inputs of a quantised base",
    "layer_replication": "LoRA on repeated layers, which share the base's weights and have no merge",
    "kasa_config": "KaSA, which truncates the base itself",
    "megatron_config": "LoRA on Megatron's parallel layers",
}
_UNMERGED = ("alora_invocation_tokens", "arrow_config", "layer_replication")
# init_lora_weights: the base changes when the adapter is loaded.
_CHANGED_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false", "none")
_KNOWN = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
    "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_bdlora",
    "use_dora", "use_qalora", "use_rslora", "velora_config", "enable_lora", "merge_weights", "target_modules_to_tie",
    "modules_to_tie",
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Scale and rank of a module by adapter_config.json, and the patterns that both fit its name, if several do."""

    value: float
    rank: int
    several: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blocks:
    """Block-diagonal factors: how many blocks, and parts of names of the modules whose A or B has them."""

    count: int
    a: tuple[str, ...]
    b: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """Settings of adapter_config.json, as far as it decides values. `read_settings` makes it of PEFT's."""

    file: Path
    rank: int = 1
    alpha: float = 1.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    transposed: bool = False  # fan_in_fan_out
    parameters: tuple[str, ...] = ()  # target_parameters
    saved: tuple[str, ...] = ()  # modules_to_save
    tokens: Any = None  # trainable_token_indices
    blocks: Blocks | None = None
    keeps_tie: bool = False  # ensure_weight_tying
    base: str = ""  # base_model_name_or_path
    notes: tuple[str, ...] = ()

    def scale(self, module: str) -> Scale:
        """Scale and rank of a module, or of a parameter, by the first patterns that fit its name."""
        ranks, alphas = list(_fitting(self.ranks, module)), list(_fitting(self.alphas, module))
        rank = self.ranks[ranks[0]] if ranks else self.rank
        alpha = self.alphas[alphas[0]] if alphas else self.alpha
        several = next((tuple(found) for found in (ranks, alphas) if len(found) > 1), ())
        return Scale(alpha / (math.sqrt(rank) if self.rslora else rank), rank, several)

    def targets(self, parameter: str) -> bool:
        """Whether a parameter, not its module, is what is adapted: patterns are then held against its own name."""
        return any(f".{parameter}".endswith(f".{name}") for name in self.parameters)

    def token_indices(self, module: str) -> tuple[int, ...] | None:
        """Rows of the table of a module that are replaced; None if nothing says so."""
        found = self.tokens
        if isinstance(found, Mapping):
            found = next((found[name] for name in found if module == name or module.endswith(f".{name}")), None)
        if isinstance(found, list) and all(type(index) is int for index in found):
            return tuple(found)
        return None


def _fitting(patterns: Mapping[str, Any], module: str) -> Iterator[str]:
    return (pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module))


def read_settings(file: Path, config: Mapping[str, Any], remedy: str = "") -> Settings:
    """Check what an adapter_config.json says. Raises CheckpointError for all that cannot be read, with a remedy: to
    apply it with PEFT, unless another one is given."""
    remedy = remedy or merged_by_peft(file.parent)
    _refuse_kind(file, config, remedy)
    _refuse_variants(file, config, remedy)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if type(rank) is not int or rank < 1:
        raise _wrong(file, "r", rank, "a whole number from 1 on")
    if not _is_number(alpha):
        raise _wrong(file, "lora_alpha", alpha, "a number")
    ranks, alphas = (_patterns(file, config, key) for key in ("rank_pattern", "alpha_pattern"))
    for pattern, value in ranks.items():
        if type(value) is not int or value < 1:
            raise _wrong(file, f"rank_pattern[{pattern!r}]", value, "a whole number from 1 on")
    unknown = [key for key, value in config.items() if key not in _KNOWN and value]
    notes = (
        [f"{file}: ignored {', '.join(unknown[:5])}, which PEFT 0.21 does not know; check that it changes no weights"]
        if unknown
        else []
    )
    return Settings(
        file=file,
        rank=rank,
        alpha=float(alpha),
        ranks=ranks,
        alphas={pattern: float(value) for pattern, value in alphas.items()},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        transposed=bool(config.get("fan_in_fan_out")),
        parameters=_names(file, config, "target_parameters"),
        saved=_names(file, config, "modules_to_save"),
        tokens=config.get("trainable_token_indices"),
        blocks=_blocks(file, config.get("use_bdlora")),
        keeps_tie=bool(config.get("ensure_weight_tying")),
        base=str(config.get("base_model_name_or_path") or ""),
        notes=tuple(notes),
    )


def several_fit(file: Path, patterns: Iterable[str], module: str) -> str:
    """Note for a module that several patterns fit."""
    return (
        f"{file}: the patterns {first_few(patterns)} all fit {module}; the first is taken, as PEFT does, which sorts "
        "them when it saves"
    )


def merged_by_peft(folder: Path) -> str:
    """Remedy: how PEFT makes a model of an adapter."""
    return (
        f"apply it with PEFT (PeftModel.from_pretrained(BASE, {str(folder)!r}).merge_and_unload()"
        ".save_pretrained(OUT)) and name OUT"
    )


def _refuse_kind(file: Path, config: Mapping[str, Any], remedy: str) -> None:
    kind = config.get("peft_type")
    if kind is None:
        raise CheckpointError(
            f"{file}: names neither a peft_type nor a fine_tune_type, so that it is of no adapter of PEFT or mlx-lm; "
            "give one that they have saved"
        )
    kind = str(kind).rpartition(".")[2].upper()
    if kind == "LORA":
        return
    if kind in _UNMERGED_KINDS:
        raise CheckpointError(
            f"{file}: is an adapter of type {kind}, which changes no weights, or by the input, so that no merge of it "
            "exists; leave it out of the config"
        )
    text = f"{file}: is an adapter of type {shorten(kind)}, and only LORA is read; {remedy}"
    if kind in _CONVERTED:
        text += ", or turn it into LoRA with peft.tuners.lora.conversion.save_as_lora"
    raise CheckpointError(text)


def _refuse_variants(file: Path, config: Mapping[str, Any], remedy: str) -> None:
    for key, what in _VARIANTS.items():
        if config.get(key):
            remedy = "leave it out of the config" if key in _UNMERGED else remedy
            raise CheckpointError(f"{file}: has {key}: it is {what}; {remedy}")
    init = str(config.get("init_lora_weights", True)).lower()
    if _CHANGED_BASE.fullmatch(init):
        remedies = [_converted(file.parent)] if _can_be_converted(file, config) else []
        remedies += [remedy] if init in ("pissa", "olora") else []
        raise CheckpointError(
            f"{file}: has init_lora_weights: {init}, whose training starts from a changed base; "
            + (", or ".join(remedies) or "merge it where it was trained (merge_and_unload), and name the result")
        )
    if init == "loftq":
        raise CheckpointError(
            f"{file}: has init_lora_weights: loftq, whose training starts from a quantised base of its own; name that "
            "one as base, dequantised, and set init_lora_weights: true in the file"
        )
    if init not in _PLAIN_INITS:
        raise CheckpointError(
            f"{file}: has init_lora_weights: {shorten(init)}, which may change the base when it is loaded; {remedy}"
        )


def _can_be_converted(file: Path, config: Mapping[str, Any]) -> bool:
    """Whether PEFT can read the folder, and does not refuse to make a plain adapter of it."""
    refused = config.get("use_rslora") and (config.get("rank_pattern") or config.get("alpha_pattern"))
    return file.name == ADAPTER_CONFIG and not refused


def _converted(folder: Path) -> str:
    """Remedy: how PEFT makes a plain adapter of one that starts from a changed base, which it need not load."""
    return (
        "make a plain adapter of it with PEFT: with init_lora_weights: true in this file, PeftModel.from_pretrained("
        f"BASE, {str(folder)!r}).save_pretrained(OUT, path_initial_model_for_weight_conversion=FIRST), FIRST being its "
        "folder from before training, and name OUT"
    )


def _patterns(file: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise _wrong(file, key, found, "a mapping of patterns to numbers")
    for pattern, value in found.items():
        if not _is_number(value):
            raise _wrong(file, f"{key}[{pattern!r}]", value, "a number")
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{file}: {key} has {shorten(pattern)}, no regular expression ({error}); correct it"
            ) from error
    return found


def _names(file: Path, config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = config.get(key) or []
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(name, str) for name in names):
        raise _wrong(file, key, found, "a list of names")
    return tuple(names)


def _blocks(file: Path, said: Any) -> Blocks | None:
    if not said:
        return None
    if not isinstance(said, dict) or type(said.get("nblocks")) is not int or said["nblocks"] < 1:
        raise _wrong(file, "use_bdlora", said, "a mapping with nblocks")
    a, b = (tuple(map(str, said.get(f"target_modules_bd_{side}") or ())) for side in "ab")
    return Blocks(said["nblocks"], a, b)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(file: Path, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{file}: {key} is {shorten(str(value))}, and must be {expected}; save the adapter again")
