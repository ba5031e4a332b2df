"""Quantised weights whose values would be others than the scale beside them says, and which are therefore refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pymerge.checkpoint.codes import words
from pymerge.checkpoint.dequantise.stored import ORIGINAL, Stored, wrong
from pymerge.common.names import shorten

# Words of names of what else makes numbers of codes, in formats that are not read.
_SCALING = {"scale", "scales", "scaling", "scaler", "smooth", "smoother", "offset", "offsets", "shift", "zero", "zeros"}
_SCALING |= {"zp", "qzeros", "absmax", "amax"}
# Families of Conv1D, whose weights bitsandbytes turns round before it quantises them.
_TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def refuse_unknown(stored: Stored, idle: Collection[str]) -> None:
    """Raise CheckpointError if something else in the module of a decoded weight scales or shifts it, by its name.

    Args:
        idle: tensors that are left out, being no part of the weights.
    """
    known = {*stored.gone, *stored.decoded, *idle}
    plain = {entry.name for entry in stored.decoded.values()}
    for name, entry in stored.tensors.items():
        module, _, last = name.rpartition(".")
        if f"{module}.weight" in plain and name not in known and not _SCALING.isdisjoint(words(last)):
            text = f"stands beside {shorten(f'{module}.weight')}, which is quantised in a format that is not known"
            raise wrong(entry, text, ORIGINAL)


def refuse_transposed(stored: Stored, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where bitsandbytes has quantised layers whose plain weights are d_in x d_out."""
    family = config.get("model_type")
    for name in stored.decoded if family in _TURNED else ():
        if not stored.gone.isdisjoint((f"{name.removesuffix('.weight')}.SCB", f"{name}.absmax")):
            text = f"is stored by bitsandbytes d_out x d_in, where {family} has d_in x d_out"
            raise wrong(stored.tensors[name], text, ORIGINAL)
