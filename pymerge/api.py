"""The Python interface to merges of files: `merge`, `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import engine, env
from pymerge.config import MergeConfig, load_config
from pymerge.devices import resolve_device
from pymerge.memory import budget
from pymerge.planner import DEFAULT_SHARD_BYTES, Plan, build_plan
from pymerge.progress import NoProgress, ProgressBar
from pymerge.report import MergeReport
from pymerge.sampling import delta_warnings
from pymerge.units import parse_bytes

if TYPE_CHECKING:
    import torch


def plan(
    config: str | Path | Mapping[str, Any] | MergeConfig,
    *,
    device: str | torch.device = "auto",
    memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
) -> Plan:
    """Plan a merge from headers; nothing is written.

    A few rows are read where a method has advice on the size of the deltas (wudi with a fixed lr).

    Args:
        config: path of a YAML file, YAML text, or a mapping of the same form.
        device: where the merge will compute, as in `merge`: its memory decides the sizes of the pieces.
        memory: limit for the tensors held at once, in bytes or as "8GiB"; default: three quarters of the memory that
            is available to this process. On CUDA it limits the pinned buffers, and the free memory of the device the
            tensors.
        max_shard_size: size above which a new output file is started.
        dtype: output dtype ("bfloat16", ...), instead of the config's.

    Raises:
        ConfigError, PlanError, CheckpointError: with everything that is wrong.
        BackendError: the device cannot be used here.
    """
    target = resolve_device(device)
    planned = build_plan(
        config if isinstance(config, MergeConfig) else load_config(config),
        budget(target, None if memory is None else parse_bytes(memory)),
        max_shard_bytes=parse_bytes(max_shard_size),
        dtype=dtype,
    )
    return replace(planned, warnings=(*planned.warnings, *delta_warnings(planned)))


def merge(
    config: str | Path | Mapping[str, Any] | MergeConfig,
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    backend: str | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    overwrite: bool = False,
    profile: str | Path | None = None,
) -> MergeReport:
    """Merge checkpoints on disk into the directory `out`.

    Args:
        config, memory, max_shard_size, dtype: as in `plan`.
        out: new or empty directory, or one that holds this very merge, finished (it is verified) or not (it goes on).
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:N".
        backend: "auto", "reference", "native", "triton" or "cuda"; default: PYMERGE_BACKEND, or "auto".
        progress: show a progress bar on standard error.
        overwrite: replace another merge in `out`.
        profile: file for a trace of every read, copy, computation and write, in Chrome's trace event format.

    Raises:
        PymergeError: one of its subclasses, see pymerge.errors. The output is then absent, or marked unfinished.
    """
    planned = plan(config, device=device, memory=memory, max_shard_size=max_shard_size, dtype=dtype)
    return engine.run(
        planned,
        Path(out),
        device=device,
        backend=backend or env.default_backend(),
        overwrite=overwrite,
        progress=ProgressBar("merging") if progress else NoProgress(),
        profile=None if profile is None else Path(profile),
    )
