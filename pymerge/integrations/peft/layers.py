"""Tensors of adapters in PEFT's modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pymerge.errors import ArgumentError


def of_layer(layer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Factors of a LoraLayer, and what it has beside them."""
    for side in ("lora_A", "lora_B"):
        held_here = getattr(layer, side, {})
        if name in held_here:
            yield f"{side}.weight", held_here[name].weight
            if getattr(held_here[name], "bias", None) is not None:
                yield f"{side}.bias", held_here[name].bias
    for side in ("lora_embedding_A", "lora_embedding_B"):
        if name in getattr(layer, side, {}):
            yield side, getattr(layer, side)[name]
    lengths = getattr(layer, "lora_magnitude_vector", None)
    if lengths is not None and name in lengths:
        yield "lora_magnitude_vector", getattr(lengths[name], "weight", lengths[name])


def of_replaced(wrapper: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a module that was trained whole, or rows of a table that were."""
    adapter = getattr(wrapper, "token_adapter", None)
    if adapter is None:
        if name in wrapper.modules_to_save:
            yield from wrapper.modules_to_save[name].state_dict().items()
    elif adapter.tied_adapter is None and name in adapter.trainable_tokens_delta:
        yield "token_adapter.trainable_tokens_delta", adapter.trainable_tokens_delta[name]


def matrix_of(layer: Any) -> tuple[int, int] | None:
    """Outputs and inputs of an adapted linear layer, whatever its weight is stored as."""
    rows, columns = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


def real(tensor: Tensor, path: str, name: str) -> Tensor:
    """A tensor of an adapter that has values. Raises ArgumentError for one on the meta device."""
    if tensor.is_meta:
        raise ArgumentError(f"{path}: adapter {name!r} is on the meta device; load it whole, without low_cpu_mem_usage")
    return tensor
