"""The command `pymerge extract`."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pymerge.cli import options
from pymerge.cli.console import print_lines, print_report, reported
from pymerge.common.events import recording


class Embeddings(str, Enum):
    skip = "skip"
    lora = "lora"
    full = "full"


class Rest(str, Enum):
    skip = "skip"
    full = "full"


class FullTensors(str, Enum):
    error = "error"
    save = "save"
    skip = "skip"


class Missing(str, Enum):
    error = "error"
    base = "base"


class AdapterDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Algorithm(str, Enum):
    auto = "auto"
    random = "random"
    gram = "gram"
    svd = "svd"


class Split(str, Enum):
    sqrt = "sqrt"
    b = "b"
    a = "a"


def extract(
    out: Annotated[Path, typer.Argument(help="Directory of the adapter.", show_default=False)],
    base: Annotated[str, typer.Option(help="The base: a folder, a file, or a name of the Hub.", show_default=False)],
    model: Annotated[str, typer.Option(help="The model that was fine-tuned from it.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="Rank of every tensor.", show_default=False)] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Smallest ranks that keep this share of the sum of s^2.", show_default="0.99, rank 64 at most"
        ),
    ] = None,
    sv_epsilon: Annotated[
        float | None, typer.Option("--sv-epsilon", help="Keep singular values above this one.", show_default=False)
    ] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", help="No rank above this.", show_default=False)] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only tensors that this finds (regular expression).", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No tensors that this finds (regular expression).", show_default=False)
    ] = None,
    embeddings: Annotated[Embeddings, typer.Option(help="Embeddings and heads.")] = Embeddings.skip,
    rest: Annotated[Rest, typer.Option(help="Norms, biases and others.")] = Rest.skip,
    dtype: Annotated[AdapterDtype, typer.Option(help="Dtype of the adapter.")] = AdapterDtype.float32,
    algorithm: Annotated[Algorithm, typer.Option(help="How factors are found.")] = Algorithm.auto,
    split: Annotated[Split, typer.Option(help="Where singular values go: both factors, B or A.")] = Split.sqrt,
    seed: Annotated[int, typer.Option(help="Of the random sketch.")] = 0,
    missing_tensors: Annotated[
        Missing, typer.Option("--missing-tensors", help="Tensors that the model has not; base: as in the base.")
    ] = Missing.error,
    memory: options.Memory = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report, or what would be done, as JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another output in OUT.")] = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
) -> None:
    """Write what a fine-tuned model has learnt as a LoRA adapter in PEFT's form, and say what it loses.

    The same command continues an interrupted extraction, and verifies a finished one.
    """
    with reported(), recording(log_json):
        from pymerge.extraction.api import extract as carry_out
        from pymerge.extraction.api import extraction
        from pymerge.extraction.options import ExtractOptions

        given: dict[str, Any] = {
            "rank": rank,
            "energy": energy,
            "sv_epsilon": sv_epsilon,
            "max_rank": max_rank,
            "include": tuple(include or ()),
            "exclude": tuple(exclude or ()),
            "embeddings": embeddings.value,
            "rest": rest.value,
            "dtype": dtype.value,
            "algorithm": algorithm.value,
            "split": split.value,
            "seed": seed,
        }
        if dry_run:
            planned = extraction(
                base, model, ExtractOptions(**given), missing_tensors=missing_tensors.value, memory=memory
            )
            if as_json:
                sys.stdout.write(planned.as_json() + "\n")
            else:
                print_lines(planned.lines())
            return
        report = carry_out(
            base,
            model,
            out,
            **given,
            missing_tensors=missing_tensors.value,
            memory=memory,
            progress=not quiet,
            overwrite=overwrite,
        )
        if as_json:
            sys.stdout.write(report.whole_json() + "\n")
        else:
            print_report(report, quiet=quiet)
