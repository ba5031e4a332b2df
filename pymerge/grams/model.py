"""Models of transformers that hold the weights of one block at a time, and their linear layers by names of files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pymerge.architecture.roles import classify
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import listed
from pymerge.errors import ArgumentError, CheckpointError
from pymerge.live.modules import place_of, tensors_of
from pymerge.wemoe.load import model_names
from pymerge.wemoe.modules import is_linear

Read = Callable[[TensorEntry], Tensor]


@dataclass(frozen=True)
class Opened:
    """A model whose weights are on the meta device, and what each of them is read from.

    `own` has the entry of a parameter or buffer by one of its names; None: some cannot be read one by one, as
    transformers makes them of several tensors of the files.
    """

    model: Any
    own: Mapping[str, TensorEntry] | None


def open_model(folder: Path, checkpoint: Checkpoint) -> Opened:
    """The class of transformers that config.json names, without weights. No code of the folder is run."""
    kind = model_class(folder, checkpoint)
    config = kind.config_class.from_pretrained(str(folder), local_files_only=True)
    with _parameters_on_meta():
        model = kind(config)
    model.tie_weights()
    model.eval()
    for module in model.modules():  # nobody goes on from what is kept of a text
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    there = checkpoint.tensors
    names = model_names(model, there, folder, partial=True)
    own = {mine: there[name] for name, mine in names.items()}
    state = model.state_dict(keep_vars=True)
    own |= {name: there[name] for name in state if name in there}
    known = {id(state[name]) for name in own}
    shapes = all(tuple(state[name].shape) == entry.shape for name, entry in own.items())
    whole = all(id(parameter) in known for parameter in model.parameters())
    return Opened(model, own if shapes and whole else None)


def load_whole(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[Any, tuple[str, ...]]:
    """The model with all its weights, as transformers loads it, and the names of those that its files have not.

    Transformers draws these at random: here they are NaN, and so is what depends on them, if anything counts that does.
    """
    kind = model_class(folder, checkpoint)
    try:
        model, found = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it ({error}); repair the folder") from error
    model.eval().requires_grad_(False).to(device)
    missing = tuple(sorted(found["missing_keys"]))
    for name, tensor in model.state_dict(keep_vars=True).items():  # others, of rotations, stay as they were computed
        if tensor.is_floating_point():
            tensor.data = torch.full_like(tensor, torch.nan, dtype=dtype) if name in missing else tensor.data.to(dtype)
    return model, missing


def model_class(folder: Path, checkpoint: Checkpoint) -> Any:
    """The class that config.json names first. Raises CheckpointError where transformers has none of that name."""
    import transformers

    name = next(iter(checkpoint.config.get("architectures") or ()), None)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder / 'config.json'}: architectures names {name!r}, no model class of transformers "
            f"{transformers.__version__}; install a version that has it, or correct the entry"
        )
    return found


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that are made meanwhile hold no memory; buffers do, as they are computed when a model is made."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by name: members of its lists of modules that have weights, none inside another."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{block}.") for block in found):
            members = {f"{path}.{name}": member for name, member in module.named_children()}
            found |= {name: member for name, member in members.items() if any(True for _ in member.parameters())}
    return found


def run_on(model: Any, folder: Path, batch: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Run a model on inputs; of models of images and texts, the half that takes them.

    Raises ArgumentError where it does not take them.
    """
    function: Callable[..., object] = model
    for name, argument in (("get_image_features", "pixel_values"), ("get_text_features", "input_ids")):
        if hasattr(model, name) and list(batch) == [argument]:
            function = getattr(model, name)
    try:
        function(**{name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in batch.items()})
    except (TypeError, ValueError, IndexError) as error:
        raise ArgumentError(
            f"{folder}: {type(model).__name__} does not run on {' and '.join(batch)} of "
            f"{[list(each.shape) for each in batch.values()]} ({error}); give data of the kind that it takes, or a "
            "smaller length"
        ) from error


class Weights:
    """Weights of a model on the meta device, read into it block by block.

    Args:
        read: gives the tensor of an entry of the model's files.
    """

    def __init__(self, opened: Opened, read: Read, dtype: torch.dtype, device: torch.device) -> None:
        assert opened.own is not None
        self.blocks = blocks_of(opened.model)
        self._model, self._read, self._dtype, self._device = opened.model, read, dtype, device
        self._entries = {id(_tensor(opened.model, name)): entry for name, entry in opened.own.items()}
        # Where each parameter stands, by its identity, and the blocks that have it: shared ones are outside all.
        self._slots: dict[int, list[tuple[nn.Module, str]]] = {}
        self._inside: dict[str, dict[int, nn.Parameter]] = {"": {}}
        owners: dict[int, set[str]] = {}
        for path, module in opened.model.named_modules():
            block = next((name for name in self.blocks if f"{path}.".startswith(f"{name}.")), "")
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._slots.setdefault(id(parameter), []).append((module, name))
                    owners.setdefault(id(parameter), set()).add(block)
                    self._inside.setdefault(block, {})[id(parameter)] = parameter
        shared = {key for key, blocks in owners.items() if len(blocks) > 1}
        for block, parameters in self._inside.items():
            for key in shared & parameters.keys() if block else ():
                self._inside[""][key] = parameters.pop(key)

    def load_outside(self, read: Read | None = None) -> None:
        """Read what stands in no block, and all buffers of the files, in another way if one is given."""
        read = read or self._read
        self.load("", read)
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    entry = self._entries.get(id(buffer))
                    value = buffer if entry is None else read(entry)
                    if entry is not None and value.is_floating_point():
                        value = value.to(self._dtype)
                    module._buffers[name] = value.to(self._device)

    def entries(self, block: str) -> list[TensorEntry]:
        """Entries of the weights of a block."""
        return [self._entries[key] for key in self._inside.get(block, ())]

    def load(self, block: str, read: Read | None = None) -> None:
        """Read the weights of a block, in another way if one is given."""
        for key in self._inside.get(block, ()):
            value = (read or self._read)(self._entries[key]).to(self._device, self._dtype)
            for module, name in self._slots[key]:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def free(self, block: str) -> None:
        """Give back the memory of a block."""
        for key, parameter in self._inside.get(block, {}).items():
            for module, name in self._slots[key]:
                module._parameters[name] = parameter


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    found = module._parameters.get(last)
    return found if found is not None else module._buffers[last]  # type: ignore[return-value]


def refuse_fused(folder: Path, opened: Opened, exclude: Sequence[str]) -> None:
    """Raise ArgumentError for experts in one tensor of the model of a folder, whose inputs no layer has, unless a
    pattern finds them."""
    fused = [
        name
        for name, parameter in opened.model.named_parameters()
        if parameter.ndim == 3 and "experts" in name.split(".") and not any(re.search(each, name) for each in exclude)
    ]
    if fused:
        raise ArgumentError(
            f"{folder}: {listed(fused)}: holds the experts of a layer in one tensor, where the inputs of each cannot "
            r"be seen; give --exclude '\.experts\.' to leave them without Grams: regmean then averages them"
        )


@dataclass(frozen=True)
class Linears:
    """Linear layers whose inputs count: by path, the name of the weight in the files; and weights that have none."""

    layers: Mapping[str, str]
    without: tuple[str, ...]


def linears_of(opened: Opened, model: Any, checkpoint: Checkpoint, exclude: Sequence[str]) -> Linears:
    """The layers behind the linear weights of a checkpoint, but for those whose name a pattern of `exclude` finds.

    Args:
        model: with its weights, where `opened` cannot say what they are read from.
    """
    described = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
    roles = classify(described, checkpoint.config)
    wanted = {
        name for name, role in roles.items() if role.solvable and not any(re.search(each, name) for each in exclude)
    }
    paths = {f"{path}.weight": path for path, layer in opened.model.named_modules() if is_linear(layer)}
    if opened.own is not None:
        named = {path: opened.own[own].name for own, path in paths.items() if own in opened.own}
    else:
        places = {place_of(tensor): name for name, tensor in tensors_of(str(checkpoint.path), model).items()}
        named = {path: places.get(place_of(model.get_parameter(own).detach()), "") for own, path in paths.items()}
    layers = {path: name for path, name in named.items() if name in wanted}
    return Linears(layers, tuple(sorted(wanted - set(layers.values()))))
