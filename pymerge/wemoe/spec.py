"""wemoe.json: what a WEMoE directory holds beside its plain checkpoint. docs/wemoe.md describes every field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pymerge.common.dtypes import CODES, torch_dtype
from pymerge.common.files import atomic_write
from pymerge.errors import CheckpointError

SPEC_NAME = "wemoe.json"
FORMAT_VERSION = 2  # 1 had linear layers only
_READ = (1, 2)

Size = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RouterSpec(_Strict):
    """The routers: `depth` linear layers (0: a learnable vector), one for each module or one for all.

    `layer_code` prepends eight sines and cosines of the module's index to the router's input (E-WEMoE).
    """

    depth: Literal[0, 1, 2] = 2
    shared: bool = False
    layer_code: bool = False

    @model_validator(mode="after")
    def _code_needs_a_shared_router(self) -> RouterSpec:
        if self.layer_code and not (self.shared and self.depth > 0):
            raise ValueError(
                "layer_code tells a shared router of depth 1 or 2 which module asks; leave it out otherwise"
            )
        return self


class StorageSpec(_Strict):
    """Form in which task vectors are stored; `ratio` belongs to "pruned", `rank` or `energy` to "low_rank".

    `dense_bytes` and `stored_bytes` are sizes of all task vectors, dense in `dtype` and as they are stored; 0 while
    not known.
    """

    kind: Literal["dense", "pruned", "low_rank"] = "dense"
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    rank: Size | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    dense_bytes: Annotated[int, Field(ge=0)] = 0
    stored_bytes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _parameters_belong_to_the_kind(self) -> StorageSpec:
        given = {name for name in ("ratio", "rank", "energy") if getattr(self, name) is not None}
        known: dict[str, list[set[str]]]
        known = {"dense": [set()], "pruned": [{"ratio"}], "low_rank": [{"rank"}, {"energy"}]}
        if given not in known[self.kind]:
            wanted = {"dense": "none of ratio, rank, energy", "pruned": "ratio alone", "low_rank": "rank or energy"}
            raise ValueError(f"storage {self.kind!r} takes {wanted[self.kind]}, found {sorted(given) or 'none'}")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """PyTorch's dtype of the stored values."""
        return torch_dtype(CODES[self.dtype])


class ModuleSpec(_Strict):
    """One upscaled module: its path (the name of its router), d of what the router sees, its parameters' shapes.

    Names and shapes are those of the checkpoint's tensors: weights and biases of linear layers and convolutions only.
    """

    path: Name
    hidden_size: Size
    parameters: Annotated[dict[Name, list[Size]], Field(min_length=1)]

    @model_validator(mode="after")
    def _layers_only(self) -> ModuleSpec:
        for name, shape in self.parameters.items():
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and 2 <= len(shape) <= 5:
                continue
            if kind == "bias" and len(shape) == 1 and f"{layer}.weight" in self.parameters:
                continue
            raise ValueError(
                f"{name} {shape} is neither the weight of a linear layer (2-D) or convolution (3-D to 5-D) nor a bias "
                "(1-D) beside one"
            )
        return self


class Spec(_Strict):
    """The content of wemoe.json."""

    format: Literal["pymerge-wemoe"] = "pymerge-wemoe"
    version: int = FORMAT_VERSION
    architecture: str
    experts: Annotated[list[Name], Field(min_length=1)]
    init_lambda: float = 0.3
    reduce: Literal["sample", "batch"] = "sample"
    router: RouterSpec = RouterSpec()
    storage: StorageSpec = StorageSpec()
    modules: Annotated[list[ModuleSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_together(self) -> Spec:
        if self.version not in _READ:
            raise ValueError(f"version {self.version} is none of {_READ}, which this release reads")
        if self.version == 1 and any(len(shape) > 2 for module in self.modules for shape in module.parameters.values()):
            raise ValueError("version 1 has no convolutions, and a module has one")
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts {self.experts} repeat a name")
        paths = [module.path for module in self.modules]
        if len(set(paths)) != len(paths):
            raise ValueError("modules repeat a path")
        names = [name for module in self.modules for name in module.parameters]
        if len(set(names)) != len(names):
            raise ValueError("two modules hold the same parameter")
        sizes = {module.hidden_size for module in self.modules}
        if self.router.shared and len(sizes) > 1:
            raise ValueError(f"a shared router needs one hidden_size, the modules have {sorted(sizes)}")
        return self

    @property
    def tasks(self) -> int:
        """T, the number of experts."""
        return len(self.experts)


def read_spec(folder: Path | str) -> Spec:
    """Read and check wemoe.json of a directory. Raises CheckpointError, with field and remedy, if it is not valid."""
    path = Path(folder) / SPEC_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give a directory written by pymerge's WEMoE"
        ) from error
    try:
        return Spec.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CheckpointError(
            f"{path}: {field}: {_reason(first)}; build the directory again or correct the file"
        ) from error


def _reason(error: Any) -> str:
    """A validation error's text, and the value where it is short."""
    text = str(error["msg"]).removeprefix("Value error, ")
    value = repr(error["input"])
    return f"{text} (found {value})" if len(value) <= 60 else text


def spec_bytes(spec: Spec) -> bytes:
    """The content of wemoe.json."""
    return (json.dumps(spec.model_dump(exclude_none=True), indent=1, ensure_ascii=False) + "\n").encode()


def write_spec(folder: Path | str, spec: Spec) -> None:
    """Write wemoe.json, whole or not at all. Raises OutputError."""
    atomic_write(Path(folder) / SPEC_NAME, spec_bytes(spec))
