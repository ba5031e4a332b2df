"""`pymerge collect`: statistics of a model's inputs on data, for merges that use them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pymerge.cli import options
from pymerge.cli.console import ERR, print_lines, reported
from pymerge.common.events import recording


class RunDtype(str, Enum):
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


def collect(
    model: Annotated[
        str, typer.Argument(help="Folder of a transformers model, or its name on the Hub.", show_default=False)
    ],
    data: Annotated[Path, typer.Argument(help="Folder of texts or images.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.", show_default=False)],
    samples: Annotated[int, typer.Option(min=1, help="Texts or images that count, the first ones.")] = 256,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop before the text with which there are more tokens.", show_default="all"),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each text that count, the first ones.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Samples of one shape that run at once.")] = 8,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Leave out weights whose name it finds; repeatable.", show_default=False),
    ] = None,
    device: options.Device = "auto",
    dtype: Annotated[RunDtype, typer.Option(help="In which the model runs.")] = RunDtype.float32,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
) -> None:
    """Run MODEL over DATA and write the mean of x x^T over the inputs x of each linear weight: what `regmean` uses.

    DATA holds .txt files (a text each), .jsonl files (on each line a text, or {"text": "...", "target": "..."}; models
    with a decoder of their own need targets) or images, in folders of any depth, in the order of their paths. MODEL's
    own tokenizer or image processor reads them. Nothing is padded: samples of one shape run together.

    Weights are in memory one block at a time, with the hidden states of all samples, where the model's blocks run one
    after the other; else the whole model and all Grams are. Biases, norms, embeddings and heads have no Gram.

    The same command goes on where an interrupted one stopped, with the blocks that are still to do.
    Needs the extra `collect` of pymerge-engine: transformers, tokenizers and pillow.
    """
    with reported(), recording(log_json):
        from pymerge.common.names import listed
        from pymerge.grams.collect import Settings, collect

        settings = Settings(samples, max_tokens, length, batch, dtype.value, tuple(exclude or ()))
        found = collect(model, data, out, settings, device=device, progress=not quiet)
        if quiet:
            return
        if found.without:
            ERR.print(f"warning: no Gram of {listed(found.without)}", style="yellow", markup=False)
        how = "is there already" if found.found_there else f"ran {'block by block' if found.by_blocks else 'whole'}"
        print_lines([f"{out}: {found.grams} Grams of {found.tokens} tokens ({how})"])
