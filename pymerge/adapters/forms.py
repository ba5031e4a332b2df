"""Forms of adapters: whose files they are, by the names of their tensors and what is beside them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from typing import Any

from pymerge.checkpoint.model_files import DIFFUSERS_WEIGHTS

# The settings of PEFT that diffusers writes into the header of a file.
METADATA = "lora_adapter_metadata"
# Names of kohya's scripts and of LyCORIS: which part of a pipeline, a module with _ for its dots, and what of it.
KOHYA = re.compile(r"(?P<part>lora_[A-Za-z]+\d*|lycoris)_(?P<module>\w+)\.(?P<field>[\w.]+)")
_PEFT = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")
_DIFFUSERS = re.compile(r"\.lora\.(down|up)\.|[._]lora_linear_layer\.|_lora\.(down|up)\.|\.lora_(down|up)\.")
_ENDS = (".lora_a", ".lora_b")  # mlx-lm's
_OTHERS = (".hada_w", ".lokr_w")
# Names of factors in forms that are not read, and how those who write them make one of it that is.
_FOREIGN = (
    (
        re.compile(r"\.lora_[ab]\.weight$"),
        "it is in torchtune's own form; save it with torchtune's FullModelHFCheckpointer, which writes it for PEFT, "
        "too, and name the folder that has adapter_config.json",
    ),
    (
        re.compile(r"(^|[._])adapter\.linear_(in|out)\.weight$"),
        "it is in the form of Megatron and NeMo; export it for PEFT (NeMo: llm.export_ckpt with target 'hf-peft'), or "
        "merge it into its model there and export that for transformers, and name the result",
    ),
)


class Form(str, Enum):
    """Writer of adapters like it."""

    PEFT = "PEFT"
    MLX = "mlx-lm"
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"


def form_of(file: str, names: Collection[str], config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> Form:
    """The form of an adapter, given the name of its file, those of its tensors, its adapter_config.json and the
    header's metadata."""
    if any(KOHYA.fullmatch(name) and _is_other(name) for name in names):
        return Form.KOHYA
    if config is not None and config.get("peft_type") is not None:
        return Form.PEFT
    if is_of_mlx(config) or any(name.endswith(_ENDS) for name in names):
        return Form.MLX
    if config is None and (METADATA in metadata or file in DIFFUSERS_WEIGHTS or any(map(_DIFFUSERS.search, names))):
        return Form.DIFFUSERS
    return Form.PEFT


def is_of_mlx(config: Mapping[str, Any] | None) -> bool:
    """Whether an adapter_config.json is that of mlx-lm."""
    said = config or {}
    return said.get("peft_type") is None and ("fine_tune_type" in said or "lora_parameters" in said)


def unmerged(tensors: Iterable[str]) -> list[str]:
    """Names that adapters have for factors: in a model they are not merged into its weights."""
    return [name for name in tensors if any(part in name for part in _PEFT) or _is_other(name)]


def of_others(tensors: Iterable[str]) -> str:
    """The form of factors that is not read, with the remedy; "" if there are none like that."""
    return next((said for name in tensors for pattern, said in _FOREIGN if pattern.search(name)), "")


def is_alone(tensors: Collection[str]) -> bool:
    """Whether a file of these tensors is an adapter alone, whatever lies beside it."""
    if any(KOHYA.fullmatch(name) and _is_other(name) for name in tensors):
        return True
    return bool(tensors) and all(name.endswith((".alpha", ".m")) or unmerged([name]) for name in tensors)


def _is_other(name: str) -> bool:
    if any(part in name for part in _OTHERS) or name.endswith(_ENDS):
        return True
    return any(pattern.search(name) for pattern in (_DIFFUSERS, *(pattern for pattern, _ in _FOREIGN)))
