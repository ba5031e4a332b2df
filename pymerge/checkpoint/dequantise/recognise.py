"""Looking through a checkpoint for tensors whose quantised values can be had exactly, by names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.quantised import modelopt_algorithm
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import CODES, ITEM_SIZES
from pymerge.common.names import first_few

if TYPE_CHECKING:
    from pymerge.checkpoint.dequantise.stored import Stored

_METHODS = ("bitsandbytes", "mxfp4", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_CONFIG_KEYS = ("quantization_config", "compression_config")
_LEFT_OUT_KEYS = (*_CONFIG_KEYS, "quantization")
_OUTPUT_DTYPES = ("bfloat16", "float16", "float32")
# Beside a decoded weight `x.weight`, as x.NAME: what its inputs and outputs are rounded by.
_OF_INPUTS = (
    "input_scale", "output_scale", "act_scale", "activation_scale", "scale_input", "input_scale_ub", "input_zero_point",
    "input_global_scale",
)  # fmt: skip
# In attention modules of a quantised model: scales of what attention keeps.
_OF_CACHE = (
    "k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point", "q_zero_point", "prob_output_scale",
)  # fmt: skip
# Files beside the weights that say how they are quantised.
_FILES = ("hf_quant_config.json", "quanto_qmap.json")


@dataclass(frozen=True)
class Found:
    """A checkpoint with decoded tensors under plain names, in the place of their codes, without their scales; its
    config.json without what says that it is quantised; notes on both."""

    tensors: dict[str, TensorEntry]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def decoded(self) -> bool:
        """Whether any tensor is."""
        return bool(self.notes)


def true_of_plain(files: tuple[Path, ...], tensors: Mapping[str, TensorEntry]) -> tuple[Path, ...]:
    """Files beside these tensors that are true of an output as well, whose weights are plain."""
    decoded = any(entry.decoded_from for entry in tensors.values())
    return tuple(path for path in files if not decoded or path.name not in _FILES)


def may_decode(config: Mapping[str, Any]) -> bool:
    """Whether all that a config.json says of quantisation, if anything, is of formats that are decoded here.

    Weights that are rotated as well are those of another model.
    """
    return all(_method(said) in _METHODS and not said.get("transform_config") for said in _said(config))


def dequantise(
    path: Path, tensors: dict[str, TensorEntry], config: dict[str, Any], stamps: Mapping[Path, tuple[int, int]]
) -> Found:
    """The checkpoint with all tensors decoded that can be; as it is where there are none, or config.json names another
    format.

    Args:
        path: of the checkpoint, for notes.
        tensors: all that are stored.
        config: config.json, {} without one.
        stamps: sizes and times of the files; some bytes of quantised checkpoints are read.

    Raises:
        CheckpointError: a tensor that belongs to a quantised one is missing, does not fit, or stands for nothing.
    """
    said = list(_said(config)) or ([{"quant_method": "modelopt"}] if modelopt_algorithm(path) else [])
    coded = any(ITEM_SIZES[entry.dtype] == 1 for entry in tensors.values())  # every format has some such
    if not coded or not may_decode(config):
        return Found(tensors, config)
    from pymerge.checkpoint.dequantise import bitsandbytes, eight_bits, mxfp4, packed
    from pymerge.checkpoint.dequantise.stored import Stored
    from pymerge.checkpoint.dequantise.unknown import refuse_transposed, refuse_unknown

    method, settings = (_method(said[0]), said[0]) if said else ("", {})
    with Reader(stamps) as reader:
        stored = Stored(tensors, method, settings, _output_dtype(config), reader)
        for form in (bitsandbytes, mxfp4, packed, eight_bits):
            form.find(stored)
    if not stored.decoded:
        return Found(tensors, config)
    idle = _idle(stored)
    refuse_unknown(stored, idle)
    refuse_transposed(stored, config)
    kept: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        if name in stored.decoded:
            kept[stored.decoded[name].name] = stored.decoded[name]
        elif name not in stored.gone and name not in idle:
            kept[name] = entry
    return Found(kept, _plain(config), tuple(f"{path}: {note}" for note in _notes(stored, idle)))


def _said(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Quantisation that a config.json, or a config inside it, tells of."""
    for key, value in config.items():
        if key in _CONFIG_KEYS and value:
            yield value if isinstance(value, Mapping) else {"quant_method": str(value)}
        elif isinstance(value, Mapping):
            yield from _said(value)


def _method(said: Mapping[str, Any]) -> str:
    if said.get("quant_method") is None and {"load_in_4bit", "load_in_8bit"} & set(said):
        return "bitsandbytes"
    return str(said.get("quant_method"))


def _output_dtype(config: Mapping[str, Any]) -> str:
    """The code of config.json's dtype, or of that of a config inside it, if weights may have it; else bfloat16's."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key)).removeprefix("torch.")
            if name in _OUTPUT_DTYPES:
                return CODES[name]
    return "BF16"


def _idle(stored: Stored) -> set[str]:
    """Names of tensors that say how activations and caches are rounded."""
    weights = {entry.name.rpartition(".")[0] for entry in stored.decoded.values()}
    beside = {entry.name for entry in stored.decoded.values()}
    found = set()
    for name, entry in stored.tensors.items():
        module, _, last = name.rpartition(".")
        if (last in _OF_INPUTS and module in weights) or (last in _OF_CACHE and len(entry.shape) < 2):
            found.add(name)
        elif any(last.endswith(f"_{each}") and name.removesuffix(f"_{each}") in beside for each in _OF_INPUTS):
            found.add(name)  # of a parameter that is no module's `weight`
    return found - stored.gone - stored.decoded.keys()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, and all inside it, without what says that it is quantised."""
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _LEFT_OUT_KEYS
    }


def _notes(stored: Stored, idle: set[str]) -> Iterator[str]:
    """Notes for people, without the model's path."""
    kinds: dict[str, list[str]] = {}
    for entry in stored.decoded.values():
        kinds.setdefault(entry.decoder.kind, []).append(entry.name)
    for kind, names in kinds.items():
        yield f"{_count(len(names))} dequantised from {kind}: {first_few(names)}"
    if idle:
        text = "left out: scales of activations or of the key-value cache, which a model that is not quantised has not"
        yield f"{_count(len(idle))} {text}: {first_few(sorted(idle))}"


def _count(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"
