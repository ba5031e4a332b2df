"""`pymerge wemoe adapt`: train the routers of a WEMoE directory on data sets on disk."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from pymerge.cli.console import print_lines
from pymerge.errors import ArgumentError, OutputError
from pymerge.wemoe.adapt import AdaptReport, adapt
from pymerge.wemoe.datasets import Dataset, read_dataset
from pymerge.wemoe.heads import FeatureHead, logits_of, read_checkpoint_head, read_feature_head
from pymerge.wemoe.load import load, load_plain
from pymerge.wemoe.model import RoutedModel
from pymerge.wemoe.router_file import ROUTER_NAME


class Loss(str, Enum):
    entropy = "entropy"
    choice = "choice"
    supervised = "supervised"
    distillation = "distillation"


class Reduce(str, Enum):
    batch = "batch"
    sample = "sample"


class Autocast(str, Enum):
    none = "none"
    bfloat16 = "bfloat16"


def adapt_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="WEMoE directory.", show_default=False)],
    data: Annotated[
        list[str],
        typer.Option(metavar="TASK=FILE", help="Inputs of a task, .safetensors or .npz; once for each task."),
    ],
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=PATH",
            help="The task's own head: its expert's checkpoint, or a .safetensors file with weight and bias or scale.",
            show_default=False,
        ),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=DIR", help="The expert that distillation follows.", show_default=False),
    ] = None,
    loss: Annotated[Loss, typer.Option(help="What is minimised; entropy and choice need inputs alone.")] = Loss.entropy,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam.")] = 1000,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of each task in a step.")] = 16,
    reduce: Annotated[Reduce, typer.Option(help="Gates of the batch, as published, or of each sample.")] = Reduce.batch,
    autocast: Annotated[Autocast, typer.Option(help="Mixed precision.")] = Autocast.none,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop when the loss has not fallen for so many steps.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of samples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="Your own function that makes the model, if transformers does not have the architecture.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the routers here.", show_default="DIR's own")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Adapt the routers of DIR; nothing else changes.

    The same command continues an interrupted adaptation.
    """
    files, heads, experts = _pairs("--data", data), _pairs("--head", head or []), _pairs("--expert", expert or [])
    _check_tasks(files, heads, experts, loss)
    make = None if model is None else _function(model)
    if quiet:
        _hush_transformers()
    place = _device(device)
    target = folder / ROUTER_NAME if out is None else out
    if not target.parent.is_dir():
        raise OutputError(f"{target}: {target.parent} is no directory; make it first")
    routed = load(folder, device=place, dtype=torch.float32, model=make() if make else None)
    sets = {task: read_dataset(file, routed.model, batch_size) for task, file in files.items()}
    feature_heads, swaps = _heads(heads, routed, place)
    teachers = {
        task: load_plain(path, routed.spec.architecture, make() if make else None).to(place)
        for task, path in experts.items()
    }
    state = target.with_name(f".{target.stem}.adapting.safetensors")
    report = adapt(
        routed,
        sets,
        steps=steps,
        lr=lr,
        loss=loss.value,
        logits=logits_of(feature_heads),
        teachers=teachers or None,
        heads=swaps,
        reduce=reduce.value,
        autocast=torch.bfloat16 if autocast is Autocast.bfloat16 else None,
        checkpoint=state,
        patience=patience,
        seed=seed,
        data=_identity(sets, [*data, *(head or []), *(expert or [])], autocast),
        progress=not quiet,
    )
    routed.save_router(target)
    state.unlink()
    if not quiet:
        print_lines(_lines(report, target))


def _pairs(option: str, given: list[str]) -> dict[str, Path]:
    """TASK=PATH arguments, in their order."""
    found: dict[str, Path] = {}
    for text in given:
        task, equals, path = text.partition("=")
        if not (task and equals and path):
            raise ArgumentError(f"{option} is {text!r}; give TASK=PATH")
        if task in found:
            raise ArgumentError(f"{option} names task {task!r} twice; give one path for each task")
        found[task] = Path(path)
    return found


def _check_tasks(files: Mapping[str, Path], heads: Mapping[str, Path], experts: Mapping[str, Path], loss: Loss) -> None:
    for option, given in {"--head": heads, "--expert": experts}.items():
        odd = sorted(set(given) - set(files))
        if odd:
            raise ArgumentError(
                f"{option} names task {odd[0]!r}, which has no --data; the tasks are {', '.join(files)}"
            )
    if experts and loss is not Loss.distillation:
        raise ArgumentError(f"--expert is for --loss distillation, the loss is {loss.value}; leave one out")
    missing = sorted(set(files) - set(experts))
    if loss is Loss.distillation and missing:
        raise ArgumentError(
            f"--loss distillation needs the expert of task {missing[0]!r}; give --expert {missing[0]}=DIR"
        )


def _function(text: str) -> Callable[[], nn.Module]:
    """The user's FUNCTION of FILE.py."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.suffix == ".py" and path.is_file() else None
    if spec is None or spec.loader is None:
        raise ArgumentError(f"--model is {text!r}; give FILE.py:FUNCTION of a file that exists")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise ArgumentError(f"--model: {path} has no function {name!r}; give the name of one")

    def make() -> nn.Module:
        made = found()
        if not isinstance(made, nn.Module):
            raise ArgumentError(f"--model: {name} of {path} gave a {type(made).__name__}; return a torch.nn.Module")
        return made

    return make


def _hush_transformers() -> None:
    """No progress bars of its own while it loads weights."""
    if importlib.util.find_spec("transformers") is not None:
        importlib.import_module("transformers.utils.logging").disable_progress_bar()


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ArgumentError(f"--device is {text!r}; choose auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"--device is {text!r}, PyTorch sees {torch.cuda.device_count()} CUDA devices; give another"
        )
    return device


def _heads(
    given: Mapping[str, Path], routed: RoutedModel, device: torch.device
) -> tuple[dict[str, FeatureHead], dict[str, Any]]:
    """(heads that take features, tensors that stand for the model's own head), by task."""
    features, swaps = {}, {}
    for task, path in given.items():
        if path.suffix == ".safetensors":
            features[task] = read_feature_head(path, device)
        else:
            swaps[task] = read_checkpoint_head(path, routed.model, device)
    return features, swaps


def _identity(sets: Mapping[str, Dataset], paths: list[str], autocast: Autocast) -> str:
    """Identity of a run: all that its steps depend on beside `adapt`'s own settings."""
    parts = [*paths, autocast.value, *(f"{task} {dataset.digest()}" for task, dataset in sets.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _lines(report: AdaptReport, target: Path) -> list[str]:
    first, last = report.losses[0], report.losses[-1]
    moves = ", ".join(f"{task} {a:.4f} to {b:.4f}" for task, a, b in zip(report.tasks, first, last, strict=True))
    stopped = " (the loss no longer fell)" if report.stopped_early else ""
    return [f"{report.steps} steps{stopped}; loss of the first and last batch: {moves}", f"routers: {target}"]
