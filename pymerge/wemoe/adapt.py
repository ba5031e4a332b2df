"""Adaptation of the routers, on unlabelled batches (entropy, choice), labelled ones, or the experts' outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor
from torch.func import functional_call

from pymerge.errors import ArgumentError, NonFiniteError
from pymerge.wemoe.adapt_state import load_state, save_state
from pymerge.wemoe.model import RoutedModel

Loss = Literal["entropy", "choice", "distillation", "supervised"]
Logits = Callable[[str, Any], Tensor]  # (task, output of the model) -> logits

_EPS = 1e-8


@dataclass
class AdaptReport:
    """Report of an adaptation: `losses` holds each step's loss of each task; `stopped_early`: `patience` ran out."""

    tasks: list[str]
    losses: list[list[float]] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)


def adapt(
    model: RoutedModel,
    loaders: Mapping[str, Iterable[Any]],
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    loss: Loss = "entropy",
    logits: Logits | None = None,
    teachers: Mapping[str, Callable[..., Any]] | None = None,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    reduce: Literal["sample", "batch"] = "batch",
    autocast: torch.dtype | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 100,
    patience: int | None = None,
    seed: int = 0,
    data: str = "",
    progress: bool = True,
) -> AdaptReport:
    """Adapt the routers with Adam; nothing else changes.

    Each step takes one batch of each task and adds their losses up.

    Args:
        model: left with the adapted routers; `save_router` writes them.
        loaders: for each task an iterable of batches, begun again at its end. A batch is a tensor, a mapping of the
            model's arguments, or a pair (either of these, labels); labels may also be a mapping's "labels".
        steps: Adam steps in total, those of a resumed run among them.
        lr: Adam's learning rate; its other parameters are PyTorch's defaults.
        loss: "entropy" of the predictions, arXiv 2402.00433 equation 7; "choice", the squared distance of the gates
            from 1 for the task's own expert and 0 for the others (needs inputs alone, no predictions); "supervised",
            cross entropy with labels; "distillation", KL divergence from the predictions of `teachers`.
        logits: takes a task's logits (B x classes, or B x S x vocabulary) from the model's output; default: the output
            itself, or its `logits`. It is also given the teachers' outputs.
        teachers: for each task what gives the expert's output for a batch.
        heads: for a task, tensors that stand for the model's own while it works on that task, by the wrapped model's
            names; their shapes may differ. For experts with classifiers of their own.
        reduce: "batch" gives all samples of a batch one row of gates, as published; "sample" each its own.
        autocast: bfloat16 for mixed precision, on CPU or CUDA.
        checkpoint: a .safetensors file with routers and optimiser state, written every `checkpoint_every` steps and at
            the end; if it exists the run goes on from it, past the batches that were used.
        patience: stop when the mean of the losses has not fallen below its lowest for so many steps.
        seed: of PyTorch's generator while batches are drawn; the caller's is restored.
        data: what the batches are, in the caller's words; a checkpoint of others is refused.
        progress: show a progress bar.

    Logits of three dimensions are a language model's: entropy and distillation look at the last token that the
    attention mask leaves in, supervised at every token that has a label (shifted by one; -100 has none).
    """
    _check(model, loaders, loss, teachers, heads, autocast)
    tasks = list(loaders)
    parameters = {name: parameter for name, parameter in model.routers.named_parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=lr)
    report = AdaptReport(tasks)
    settings = {"loss": loss, "lr": repr(lr), "seed": str(seed), "reduce": reduce, "tasks": "\n".join(tasks)}
    settings |= {"data": data}
    swaps = {task: {f"model.{name}": tensor for name, tensor in head.items()} for task, head in (heads or {}).items()}
    target = None if checkpoint is None else Path(checkpoint)
    if target is not None and target.exists():
        report.losses = load_state(target, parameters, optimizer, settings)
    before, training = model.reduce, model.training
    device = next(model.model.parameters()).device
    mixed: AbstractContextManager[Any] = torch.autocast(device.type, autocast) if autocast else nullcontext()
    model.reduce = reduce
    model.eval()
    try:
        with torch.random.fork_rng(), Progress(disable=not progress) as bar:
            torch.manual_seed(seed)
            streams = {task: _endless(task, loader) for task, loader in loaders.items()}
            # In the order of the run that was cut: loaders may share PyTorch's generator.
            for _ in range(report.steps):
                for stream in streams.values():
                    next(stream)
            shown = bar.add_task("adapting routers", total=steps, completed=report.steps)
            while report.steps < steps and not _out_of_patience(report, patience):
                optimizer.zero_grad()
                found = []
                for task, stream in streams.items():
                    batch = _to(next(stream), device)
                    with mixed:
                        value = _task_loss(model, task, batch, loss, logits, teachers, swaps.get(task, {}))
                    number = float(value.detach())
                    if not math.isfinite(number):
                        raise NonFiniteError(
                            f"adapt: the loss of task {task!r} is {number} at step {report.steps + 1}; "
                            "check its batches, or lower lr"
                        )
                    torch.autograd.backward(value)
                    found.append(number)
                optimizer.step()
                report.losses.append(found)
                bar.update(shown, completed=report.steps, description=f"adapting routers, loss {sum(found):.4f}")
                if target is not None and report.steps % checkpoint_every == 0:
                    save_state(target, parameters, optimizer, settings, report.losses)
    finally:
        model.reduce = before
        model.train(training)
    report.stopped_early = report.steps < steps
    if target is not None:
        save_state(target, parameters, optimizer, settings, report.losses)
    return report


def entropy(logits: Tensor) -> Tensor:
    """Mean over the samples of -sum_c p_c log(p_c + 1e-8), p = softmax(logits)."""
    shares = logits.float().softmax(-1)
    return -(shares * (shares + _EPS).log()).sum(-1).mean()


def choice(model: RoutedModel, task: str, positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """Mean over modules and samples of |g - e|^2, e being 1 for the task's own expert and 0 for the others.

    The modules' inputs are those of the task's own expert, as far as it is routed. Forward alone: there is no graph but
    the routers'.
    """
    wanted = torch.zeros(model.spec.tasks, device=next(model.model.parameters()).device)
    wanted[model.spec.experts.index(task)] = 1.0
    said = model.routers_say(wanted, *positional, **named)
    return torch.stack([(gates - wanted).square().sum(1).mean() for gates in said]).mean()


def _check(
    model: RoutedModel,
    loaders: Mapping[str, Iterable[Any]],
    loss: str,
    teachers: Mapping[str, Any] | None,
    heads: Mapping[str, Mapping[str, Tensor]] | None,
    autocast: torch.dtype | None,
) -> None:
    if not loaders:
        raise ArgumentError("adapt: no loaders were given; pass one for each task")
    if loss not in get_args(Loss):
        raise ArgumentError(f"adapt: unknown loss {loss!r}; choose one of {', '.join(get_args(Loss))}")
    if loss == "distillation" and (teachers is None or set(teachers) != set(loaders)):
        raise ArgumentError(f"adapt: distillation needs a teacher for each of {', '.join(loaders)}; pass teachers")
    own = model.model.state_dict()
    for task, head in (heads or {}).items():
        if task not in loaders:
            raise ArgumentError(f"adapt: a head for {task!r}, which is no task; the tasks are {', '.join(loaders)}")
        odd = sorted(set(head) - set(own))
        if odd:
            raise ArgumentError(f"adapt: the head of task {task!r} has {odd[0]!r}, the model has not; leave it out")
    strange = sorted(set(loaders) - set(model.spec.experts))
    if loss == "choice" and strange:
        raise ArgumentError(
            f"adapt: task {strange[0]!r} is no expert, and loss 'choice' wants a task's own; name tasks as the "
            f"experts: {', '.join(model.spec.experts)}"
        )
    if autocast not in (None, torch.bfloat16):
        raise ArgumentError(f"adapt: autocast to {autocast} would need loss scaling; give torch.bfloat16 or None")
    if not any(parameter.requires_grad for parameter in model.routers.parameters()):
        raise ArgumentError("adapt: no router parameter requires a gradient; call model.routers.requires_grad_()")


def _endless(task: str, loader: Iterable[Any]) -> Iterator[Any]:
    """Batches of a loader, from its beginning again and again."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ArgumentError(
                f"adapt: the loader of task {task!r} gave no batch; give one that can be iterated again and has some"
            )


def _to(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_to(value, device) for value in batch]
    return batch


def _inputs(task: str, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """(positional arguments, named arguments, labels) of a batch."""
    labels = None
    if isinstance(batch, list):
        if len(batch) != 2:
            raise ArgumentError(f"adapt: a batch of task {task!r} has {len(batch)} parts; give (inputs, labels)")
        batch, labels = batch
    if isinstance(batch, Mapping):
        named = dict(batch)
        labels = named.pop("labels", labels)
        return (), named, labels
    return (batch,), {}, labels


def _task_loss(
    model: RoutedModel,
    task: str,
    batch: Any,
    loss: Loss,
    logits: Logits | None,
    teachers: Mapping[str, Callable[..., Any]] | None,
    swap: dict[str, Tensor],
) -> Tensor:
    positional, named, labels = _inputs(task, batch)
    mask = named.get("attention_mask")

    def predictions(output: Any) -> Tensor:
        found: Tensor = logits(task, output) if logits is not None else getattr(output, "logits", output)
        return found

    if loss == "choice":
        return choice(model, task, positional, named)
    output = predictions(functional_call(model, swap, positional, named) if swap else model(*positional, **named))
    if loss == "entropy":
        return entropy(_last(output, mask))
    if loss == "distillation" and teachers is not None:
        with torch.no_grad():
            wanted = _last(predictions(teachers[task](*positional, **named)), mask).float().log_softmax(-1)
        ours = _last(output, mask).float().log_softmax(-1)
        return F.kl_div(ours, wanted, reduction="batchmean", log_target=True)
    if labels is None:
        raise ArgumentError(f"adapt: a batch of task {task!r} has no labels; give (inputs, labels), or loss='entropy'")
    if output.ndim == 3:
        return F.cross_entropy(output[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return F.cross_entropy(output.float(), labels)


def _last(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of each sample's last token that is no padding; B x classes as they are."""
    if logits.ndim == 2:
        return logits
    if mask is None or mask.shape != logits.shape[:2]:
        return logits[:, -1]
    places = torch.arange(logits.shape[1], device=logits.device) * (mask != 0)
    return logits[torch.arange(len(logits), device=logits.device), places.argmax(1)]


def _out_of_patience(report: AdaptReport, patience: int | None) -> bool:
    if patience is None or not report.losses:
        return False
    means = [sum(losses) for losses in report.losses]
    return len(means) - 1 - means.index(min(means)) >= patience
