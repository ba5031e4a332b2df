"""Options that several commands have, and those that become arguments of `pymerge.plan`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class BackendName(str, Enum):
    auto = "auto"
    reference = "reference"
    native = "native"
    triton = "triton"
    cuda = "cuda"


class OutputDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


Config = Annotated[Path, typer.Argument(help="YAML file; mergekit's format is understood.", show_default=False)]
Backend = Annotated[BackendName | None, typer.Option(help="Which kernels compute.", show_default="auto")]
Memory = Annotated[
    str | None,
    typer.Option(help="Hold at most this much of tensors at once, such as 8GiB.", show_default="75% of what is free"),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="Take at most this much of a GPU's memory, such as 16GiB.", show_default="80% of what is free"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ShardSize = Annotated[str, typer.Option(help="Start a new file above this size.")]
Dtype = Annotated[
    OutputDtype | None, typer.Option(help="Output dtype, instead of the config's or the base's.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say which backend computes what, and which tensors are slow.")
]
LogJson = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Append events as lines of JSON; - for standard error.", show_default=False),
]


def for_plan(
    backend: BackendName | None,
    memory: str | None,
    max_shard_size: str,
    dtype: OutputDtype | None,
    **more: str | None,
) -> dict[str, Any]:
    """Arguments of `pymerge.plan`, but for the device; `more` as they are."""
    return {
        "backend": backend.value if backend else None,
        "memory": memory,
        "max_shard_size": max_shard_size,
        "dtype": dtype.value if dtype else None,
        **more,
    }
