"""Modules to mix among the tensors of a checkpoint, found from its architecture without weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.errors import CheckpointError
from pymerge.wemoe.load import model_names
from pymerge.wemoe.spec import ModuleSpec
from pymerge.wemoe.upscale import find_modules


def empty_model(base: Checkpoint, architecture: str | None = None) -> nn.Module:
    """The model of a checkpoint on the "meta" device, without weights, made by transformers from config.json.

    Args:
        base: the checkpoint; no code that it brings is run.
        architecture: class in transformers; default: the first of config.json's `architectures`.

    Raises CheckpointError if transformers is missing or cannot make it.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{base.path}: finding its modules needs transformers; pip install 'pymerge-engine[transformers]', or give "
            "model= in Python"
        ) from error
    listed = base.config.get("architectures")
    if architecture is None and isinstance(listed, list) and listed:
        architecture = str(listed[0])
    if architecture is None:
        raise CheckpointError(
            f"{base.path / 'config.json'}: names no architecture; write its class in transformers, such as "
            "LlamaForCausalLM, as wemoe.architecture in the config"
        )
    made: Any = getattr(transformers, architecture, None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{base.path / 'config.json'}: architecture {architecture!r} is no model class of transformers "
            f"{transformers.__version__}; install a version that has it, or set wemoe.architecture"
        )
    try:
        maker: Any = made
        config = maker.config_class.from_dict(base.config)
        with torch.device("meta"):
            model: nn.Module = maker(config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise CheckpointError(
            f"{base.path / 'config.json'}: transformers cannot make a {architecture} of it ({error}); correct it, or "
            "set wemoe.architecture"
        ) from error
    return model


def find_mlps(base: Checkpoint, model: nn.Module, pattern: str | None) -> list[ModuleSpec]:
    """The modules of `model` to mix, in its order, with their parameters under the names that the checkpoint has.

    Raises ArgumentError if nothing matches, CheckpointError if a parameter has no tensor of its shape.
    """
    theirs: dict[str, str] = {}
    for name, own in model_names(model, base.tensors, base.path, partial=True).items():
        theirs.setdefault(own, name)
    found = []
    for module in find_modules(model, pattern):
        parameters: dict[str, list[int]] = {}
        for own, shape in module.parameters.items():
            stored = theirs.get(own)
            if stored is None or list(base.tensors[stored].shape) != shape:
                has = "is missing" if stored is None else f"is {list(base.tensors[stored].shape)} there"
                raise CheckpointError(
                    f"{base.path}: {own!r} {shape} of {type(model).__name__} {has}; save the base with this version "
                    "of transformers, or set wemoe.modules to some that it has"
                )
            parameters[stored] = shape
        found.append(module.model_copy(update={"parameters": parameters}))
    return found
