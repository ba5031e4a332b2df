"""The Python interface to adapters that are made: `extract`, `merge_adapters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.api import plan
from pymerge.common.progress import NoProgress, ProgressBar
from pymerge.config.merge_config import MergeConfig, load_config
from pymerge.config.references import same_model
from pymerge.errors import PlanError
from pymerge.extraction.carry_out import carry_out
from pymerge.extraction.extracted import plan_extraction
from pymerge.extraction.merged import EXACT, plan_merge
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.report import ExtractReport
from pymerge.extraction.work import Work
from pymerge.planner.integers import BY_RULE


def extract(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sv_epsilon: float | None = None,
    max_rank: int | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    embeddings: str = "skip",
    rest: str = "skip",
    dtype: str = "float32",
    algorithm: str = "auto",
    split: str = "sqrt",
    seed: int = 0,
    missing_tensors: str = "error",
    memory: int | str | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> ExtractReport:
    """Write what a fine-tuned model has learnt as a LoRA adapter of its base, in PEFT's form, into the directory `out`.

    Each linear weight and convolution gets the best factors of its rank; the report states what they lose. Without
    `rank`, `energy` and `sv_epsilon`, a tensor gets the smallest rank that keeps 99 % of the sum of s^2, at most 64.

    Args:
        base: folder, file or Hub name of the base, which adapter_config.json will name as it is written here.
        model: the fine-tuned model.
        out: new or empty directory, or one that holds this very extraction, finished (it is verified) or not (it goes
            on).
        rank: of every tensor, or less where its difference has less.
        energy: the smallest rank that keeps this share of the sum of s^2 of a tensor.
        sv_epsilon: singular values above this one are kept, at least one.
        max_rank: no tensor gets more.
        include, exclude: regular expressions; tensors whose names some `include` finds, and no `exclude`. Others are
            not read.
        embeddings: embeddings and heads: "skip", "lora", or "full" (modules_to_save).
        rest: norms, biases and others: "skip", or "full" (modules_to_save; biases of adapted modules as such).
        dtype: of what is written.
        algorithm: "auto" chooses by shape and options: "random" (a sketch, refined) or "gram" (all singular values);
            "svd" is a whole decomposition in float64.
        split: where the singular values go: "sqrt" half to each factor, "b" or "a".
        seed: of the sketch.
        missing_tensors: tensors of the base that the model has not: "error", or "base": they count as the base's.
        memory: limit for what is held at once, as of `pymerge.plan`.
        progress: show a progress bar on standard error.
        overwrite: replace something else that pymerge has written in `out`.

    Raises:
        ArgumentError: an option is not what it can be.
        PymergeError: another of its subclasses, see pymerge.errors. The output is then absent, or marked unfinished.
    """
    options = ExtractOptions(
        rank,
        energy,
        sv_epsilon,
        max_rank,
        (include,) if isinstance(include, str) else tuple(include),
        (exclude,) if isinstance(exclude, str) else tuple(exclude),
        embeddings,
        rest,
        dtype,
        algorithm,
        split,
        seed,
    )
    work = extraction(base, model, options, missing_tensors=missing_tensors, memory=memory)
    bar = ProgressBar("extracting") if progress else NoProgress()
    return carry_out(work, Path(out), bar, overwrite=overwrite)


def extraction(
    base: str | Path,
    model: str | Path,
    options: ExtractOptions,
    *,
    missing_tensors: str = "error",
    memory: int | str | None = None,
) -> Work:
    """All that `extract` would do, from the headers of both models; arguments and errors are those of `extract`."""
    if same_model(str(base), str(model)):
        raise PlanError([f"{model}: is the base itself; give the model that was fine-tuned from it"])
    config = {
        "merge_method": "task_arithmetic",
        # What the base has no place for, an adapter has none for either; a warning lists it.
        "vocabulary": "base",
        "extra_tensors": "ignore",
        "missing_tensors": missing_tensors,
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": {"weight": 1.0}}],
    }
    try:
        planned = plan(config, device="cpu", memory=memory)
    except PlanError as error:  # an extraction has no rules
        raise PlanError(problem.partition(BY_RULE)[0] for problem in error.problems) from error
    return plan_extraction(planned, options, str(base))


def merge_adapters(
    config: str | Path | Mapping[str, Any] | MergeConfig,
    out: str | Path,
    *,
    rank: str | int | float | None = None,
    full_tensors: str | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> ExtractReport:
    """Merge adapters into an adapter in PEFT's form, in the directory `out`.

    The base's weights are read only where the merge is no product of factors.

    Args:
        config: as of `pymerge.plan`, with a base_model and adapters as models.
        out: new or empty directory, or one that holds this very merge, finished (it is verified) or not (it goes on).
        rank: "exact" (the sum of all ranks), a largest rank, or below 1 the share of the sum of s^2 that is kept.
            Default: the config's `rank`, or "exact".
        full_tensors: tensors that have no factors, such as norms: "error", "save" (modules_to_save and biases), or
            "skip". Default: the config's `full_tensors`, or "error".
        dtype: of what is written: "float32", "bfloat16" or "float16". Default: the config's, or float32.
        backend, memory, progress, overwrite: as of `pymerge.plan` and `pymerge.run`.

    Raises:
        PlanError: a merged tensor is not of low rank, and no lower rank is asked for; nothing is written.
        PymergeError: another of its subclasses, see pymerge.errors.
    """
    work = merge_of_adapters(config, rank=rank, full_tensors=full_tensors, dtype=dtype, backend=backend, memory=memory)
    bar = ProgressBar("merging") if progress else NoProgress()
    return carry_out(work, Path(out), bar, overwrite=overwrite)


def merge_of_adapters(
    config: str | Path | Mapping[str, Any] | MergeConfig,
    *,
    rank: str | int | float | None = None,
    full_tensors: str | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    memory: int | str | None = None,
) -> Work:
    """All that `merge_adapters` would do, from headers; arguments and errors are those of `merge_adapters`."""
    loaded = config if isinstance(config, MergeConfig) else load_config(config)
    return plan_merge(
        plan(loaded, device="cpu", backend=backend, memory=memory, dtype="float32"),
        rank=str(_first(rank, loaded.rank, EXACT)),
        full_tensors=_first(full_tensors, loaded.full_tensors, "error"),
        dtype=_first(dtype, loaded.out_dtype, loaded.dtype, "float32"),
    )


def _first(*values: Any) -> Any:
    """The first of some values that is given."""
    return next(value for value in values if value is not None)
