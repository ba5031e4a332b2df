"""Load a WEMoE directory as a module, and write one from a module in memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import ArgumentError, CheckpointError
from pymerge.ops.routed.task_storage import Tasks
from pymerge.wemoe.model import RoutedModel
from pymerge.wemoe.modules import RoutedLayer
from pymerge.wemoe.router import make_routers
from pymerge.wemoe.router_file import read_routers, write_routers
from pymerge.wemoe.spec import read_spec, write_spec
from pymerge.wemoe.task_vectors import TaskVectorFiles, TaskVectorWriter, decode, encode


def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
) -> RoutedModel:
    """Load a WEMoE directory.

    Args:
        path: a directory as docs/wemoe.md describes it.
        device: where to put the model.
        dtype: of the weights; default: as they are stored. Task vectors keep theirs, routers are float32.
        model: an instance of an architecture that transformers does not have; its weights are overwritten. Without
            it, transformers makes the class that config.json names; no code of the directory is run.

    Raises CheckpointError for whatever is missing, damaged or does not fit together.
    """
    folder = Path(path)
    spec = read_spec(folder)
    if model is None:
        model = _from_transformers(folder, spec.architecture, dtype)
    else:
        _fill(model, folder)
        model.to(dtype)
    names = model_names(model, [name for module in spec.modules for name in module.parameters], folder)
    files = TaskVectorFiles(folder)
    vectors: dict[str, Tasks | Tensor] = {}
    for module in spec.modules:
        for name, shape in module.parameters.items():
            own = model.get_parameter(names[name])
            if list(own.shape) != shape:
                raise CheckpointError(
                    f"{folder / 'wemoe.json'}: {name} is {shape}, the model's {names[name]} is {list(own.shape)}; "
                    "build the directory again"
                )
            vectors[name] = decode(name, shape, spec.tasks, spec.storage, files)
    files.check_all_taken()
    routers = make_routers(spec)
    read_routers(folder, spec, routers)
    return RoutedModel(model.eval(), spec, names, vectors, routers).to(device)


def load_plain(folder: Path, architecture: str, model: nn.Module | None = None) -> nn.Module:
    """A plain checkpoint, such as an expert's, as a float32 model for inference; as `load` makes its model."""
    if model is None:
        model = _from_transformers(folder, architecture, torch.float32)
    else:
        _fill(model, folder)
    return model.to(torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def save(module: RoutedModel, path: Path | str, max_shard_bytes: int = 1 << 30) -> None:
    """Write a module as a WEMoE directory; `load` gives it back (transposed weights are stored as the model has them).

    In the plain checkpoint what is mixed is the base's; a transformers model is written by its own save_pretrained.
    Raises OutputError, or ArgumentError if the directory exists.
    """
    folder = Path(path)
    if folder.exists():
        raise ArgumentError(f"{folder} exists; name a directory that does not")
    folder.mkdir(parents=True)
    plain: Any = module.static()
    if hasattr(plain, "save_pretrained"):
        plain.save_pretrained(folder)
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, folder / "model.safetensors"
        )
    inverse = {
        own: name for name, own in model_names(plain, open_checkpoint(folder).tensors, folder, partial=True).items()
    }
    layers = {name: layer for name, layer in module.model.named_modules() if isinstance(layer, RoutedLayer)}
    writer = TaskVectorWriter(folder, max_shard_bytes)
    parameters: dict[str, dict[str, list[int]]] = {unit.path: {} for unit in module.units}
    own_parameters = dict(plain.named_parameters())
    dense = 0
    for own, layer in layers.items():
        for kind, tasks in {"weight": layer.stored_tasks, "bias": layer.bias_tasks}.items():
            if tasks is None:
                continue
            name, own_parameter = inverse[f"{own}.{kind}"], own_parameters[f"{own}.{kind}"]
            parameters[layer.unit.path][name] = list(own_parameter.shape)
            dense += module.spec.tasks * own_parameter.numel() * module.spec.storage.torch_dtype.itemsize
            writer.add(encode(name, own_parameter.shape, tasks, module.spec.storage))
    writer.close()
    sizes = {"dense_bytes": dense, "stored_bytes": writer.stored_bytes}
    storage = module.spec.storage.model_copy(update=sizes)
    modules = [spec.model_copy(update={"parameters": parameters[spec.path]}) for spec in module.spec.modules]
    spec = module.spec.model_copy(update={"storage": storage, "modules": modules, "reduce": module.reduce})
    write_routers(folder, spec, module.routers)
    write_spec(folder, spec)


def model_names(model: nn.Module, names: Iterable[str], folder: Path, *, partial: bool = False) -> dict[str, str]:
    """The model's own name of each checkpoint tensor.

    They differ where transformers renames old checkpoints while it loads them, and where the checkpoint is of the bare
    model and the class has a head, or the reverse. Raises CheckpointError for a name that the model does not have,
    unless `partial`, which leaves it out.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rename = _renaming(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name in names:
        new = rename(name)
        candidates = [name, new, prefix + new, new.removeprefix(prefix)]
        match = next((candidate for candidate in candidates if candidate in own), None)
        if match is not None:
            found[name] = match
        elif not partial:
            raise CheckpointError(
                f"{folder / 'wemoe.json'}: {type(model).__name__} has no parameter {name!r} (nor {new!r}); "
                "build the directory again, or install the version of transformers that it was built for"
            )
    return found


def _renaming(model: nn.Module) -> Any:
    """transformers' renaming of checkpoint tensors (from version 5 on); before that, and without it, none."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:
        return lambda name: name
    if not hasattr(model, "save_pretrained"):
        return lambda name: name
    renamings = [one for one in mapping.get_model_conversion_mapping(model) if isinstance(one, loading.WeightRenaming)]
    return lambda name: loading.rename_source_key(name, renamings, [])[0]


def _from_transformers(folder: Path, name: str, dtype: torch.dtype | None) -> nn.Module:
    """The class of this name, from transformers itself, with the weights of the directory."""
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{folder}: a {name} needs transformers; pip install 'pymerge-engine[transformers]', or give model="
        ) from error
    architecture = getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder / 'wemoe.json'}: architecture {name!r} is no model class of transformers "
            f"{transformers.__version__}; install a version that has it, or give model="
        )
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    options["dtype" if version >= (4, 56) else "torch_dtype"] = dtype or "auto"
    try:
        model: nn.Module = cast(Any, architecture).from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it ({error}); build the directory again") from error
    return model


def _fill(model: nn.Module, folder: Path) -> None:
    """Load the plain checkpoint into a model of the caller."""
    tensors: dict[str, Tensor] = {}
    for file in open_checkpoint(folder).files:
        tensors |= load_file(file)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the given model does not fit ({error}); give one of this architecture"
        ) from error
