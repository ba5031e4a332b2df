"""Tensors of models in memory under the names that their files have: views, no copies."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pymerge.errors import ArgumentError

# A module, or tensors by name.
Model: TypeAlias = nn.Module | Mapping[str, Tensor]
# What torch.compile and wrappers for training put into names, as parts of their own.
_COMPILED, _WRAPPED = "_orig_mod", "module"
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's and those of data-parallel training."""
    while True:
        inner = getattr(module, _COMPILED, None) or (getattr(module, _WRAPPED) if _is_wrapper(module) else None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def tensors_of(owner: str, model: Model) -> dict[str, Tensor]:
    """The tensors of a model by the names of its files, detached, in the model's own memory.

    What transformers holds otherwise than its files (experts in stacks, other names) is seen as in them. A tensor with
    several names has them all.

    Args:
        owner: what messages call the model.

    Raises:
        ArgumentError: parameters that cannot be read or written as numbers: quantised, sharded, or not in memory.
    """
    if isinstance(model, nn.Module):
        module = unwrapped(model)
        state = dict(_state(owner, module))
        return _as_in_files(module, state) if _is_of_transformers(module) else state
    found = {}
    for name, tensor in _plain_names(model).items():
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{owner}: {name!r} is a {type(tensor).__name__}; pass tensors by name, or a module")
        found[name] = _checked(owner, name, tensor)
    return found


def signature_of(model: Model) -> tuple[Any, ...]:
    """Signature of a model's tensors, which changes where they are replaced by others."""
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    return tuple((name, *place_of(tensor)) for name, tensor in state.items() if isinstance(tensor, Tensor))


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Key of a tensor, equal for those that are the same elements of the same memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    begins = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (tensor.device, *begins, tensor.shape, tensor.stride(), tensor.dtype)


def config_of(model: Model) -> dict[str, Any]:
    """Config of a module as config.json would have it; {} where it has no config."""
    config = getattr(unwrapped(model), "config", None) if isinstance(model, nn.Module) else None
    if isinstance(config, dict):
        return dict(config)
    if config is None or not hasattr(config, "to_dict"):
        return {}
    told: dict[str, Any] = config.to_dict()
    # Whether the head is tied is seen in the tensors; a quantised parameter is refused by itself.
    return {key: value for key, value in told.items() if key != "quantization_config"}


def _state(owner: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module: no weight
        if id(tensor) not in own:
            raise ArgumentError(
                f"{owner}: its state_dict gives {name!r} as a copy, which nothing can be written to; pass the tensors "
                "themselves, by name"
            )
        if isinstance(tensor, nn.Parameter) and not tensor.dtype.is_floating_point:
            kind = type(tensor).__name__
            raise ArgumentError(
                f"{owner}: parameter {name!r} is quantised ({kind}, {tensor.dtype}); load the model without "
                "quantization_config, or call its dequantize()"
            )
        yield _without(name, _COMPILED), _checked(owner, name, tensor)


def _checked(owner: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor, detached; ArgumentError unless it is plain numbers in memory."""
    remedy = None
    if tensor.is_meta:
        what, remedy = "is on the meta device, offloaded or never loaded", "load the model without device_map and meta"
    elif _kind_in(tensor, "DTensor"):
        what, remedy = "is a DTensor", "merge before the model is sharded, or pass its full_tensor()s by name"
    elif _kind_in(tensor, "FlatParameter"):
        what, remedy = "is a FlatParameter of FSDP", "merge before the model is wrapped"
    elif is_traceable_wrapper_subclass(tensor):
        what, remedy = f"is a {type(tensor).__name__}, no plain tensor", "dequantise the model, or load it plain"
    elif tensor.layout != torch.strided:
        what, remedy = f"is sparse ({tensor.layout})", "call to_dense() on it"
    elif tensor.is_complex():
        what, remedy = "has complex numbers", "pass real and imaginary part as two tensors (torch.view_as_real)"
    if remedy is not None:
        raise ArgumentError(f"{owner}: {name!r} {what}, and cannot be merged as it is; {remedy}")
    return tensor.detach()


def _kind_in(tensor: Tensor, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(tensor).__mro__)


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, _WRAPPERS)


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names without what torch.compile and data-parallel training add to them."""
    found = {_without(name, _COMPILED): tensor for name, tensor in tensors.items()}
    if found and all(name.startswith(f"{_WRAPPED}.") for name in found):
        found = {name.removeprefix(f"{_WRAPPED}."): tensor for name, tensor in found.items()}
    return found


def _without(name: str, part: str) -> str:
    return ".".join(each for each in name.split(".") if each != part) if part in name else name


def _is_of_transformers(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


class _Views(TorchFunctionMode):
    """While it is entered, nothing is copied to have its elements in a row."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function is Tensor.contiguous else function(*args, **(kwargs or {}))


def _as_in_files(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of transformers as save_pretrained names and cuts it, by its own conversion.

    Parameters of which the conversion makes copies stay as they are. Of several names of one tensor the module's first
    comes first, which is the one in files: the conversion sorts them.
    """
    try:
        revert = importlib.import_module("transformers.core_model_loading").revert_weight_conversion
    except (ImportError, AttributeError):  # before version 5 a model is as its files are
        return state
    with torch.no_grad(), _Views():
        found: dict[str, Tensor] = revert(module, dict(state))
    own = {_storage(tensor): name for name, tensor in state.items()}
    there = {_storage(tensor) for tensor in found.values()}
    kept = {name: tensor for name, tensor in found.items() if _storage(tensor) in own}
    whole = kept | {name: tensor for name, tensor in state.items() if _storage(tensor) not in there}
    order = {name: at for at, name in enumerate(state)}
    return dict(sorted(whole.items(), key=lambda item: order.get(item[0], len(order))))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
