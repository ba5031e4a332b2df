"""Adaptation: each loss falls, only routers move, a run that was cut goes on as if it had not been."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pymerge import wemoe
from pymerge.errors import ArgumentError, CheckpointError, NonFiniteError
from pymerge.testing.compare import assert_same
from pymerge.wemoe.adapt import entropy
from pymerge.wemoe.heads import read_checkpoint_head
from tests.helpers.quantised import fp8

QUIET: dict[str, Any] = {"progress": False, "lr": 0.01}


def vit(tiny: Callable[[str], Any], **settings: Any) -> tuple[wemoe.RoutedModel, dict[str, Any], dict[str, Any]]:
    """A routed ViT, unlabelled batches of two tasks, and the experts as teachers."""
    model, _, experts = tiny("vit")
    routed = wemoe.upscale(
        model, dict(zip("ab", experts, strict=False)), storage=wemoe.StorageSpec(dtype="float32"), **settings
    )
    generator = torch.Generator().manual_seed(2)
    batches = {
        task: [{"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(2)] for task in "ab"
    }
    teachers = {}
    for task, expert in zip("ab", experts, strict=False):
        teacher, _, _ = tiny("vit")
        teacher.load_state_dict(expert)
        teachers[task] = teacher
    return routed, batches, teachers


def test_entropy_is_that_of_the_predictions() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    p = 1 / (1 + torch.tensor(-2.0).exp())
    expected = (torch.log(torch.tensor(2.0)) - p * p.log() - (1 - p) * (1 - p).log()) / 2
    assert float(entropy(logits)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("loss", ["entropy", "choice", "supervised", "distillation"])
@pytest.mark.parametrize("reduce", ["batch", "sample"])
def test_each_loss_falls_and_only_routers_move(tiny: Callable[[str], Any], loss: Any, reduce: Any) -> None:
    routed, batches, teachers = vit(tiny)
    frozen = {name: value.clone() for name, value in routed.model.state_dict().items()}
    if loss == "supervised":
        batches = {task: [(b["pixel_values"], torch.tensor([0, 1, 0, 1])) for b in bs] for task, bs in batches.items()}
    report = wemoe.adapt(routed, batches, steps=30, loss=loss, teachers=teachers, reduce=reduce, **QUIET)
    assert report.steps == 30
    assert report.tasks == ["a", "b"]
    assert sum(report.losses[-1]) + sum(report.losses[-2]) < sum(report.losses[0]) + sum(report.losses[1])
    assert routed.reduce == "sample"
    for name, value in routed.model.state_dict().items():
        assert_same(name, value, frozen[name])


def test_the_first_step_is_adams(tiny: Callable[[str], Any]) -> None:
    """Both tasks' gradients add up; Adam's first step is lr times the sign."""
    routed, batches, _ = vit(tiny, router=wemoe.RouterSpec(depth=0))
    routed.reduce = "batch"
    parameters = list(routed.routers.parameters())
    total: Tensor = sum(entropy(routed(**batches[task][0]).logits) for task in "ab")
    gradients = torch.autograd.grad(total, parameters)
    expected = [p.detach() - 0.01 * g.sign() for p, g in zip(parameters, gradients, strict=True)]
    wemoe.adapt(routed, batches, steps=1, **QUIET)
    for parameter, value in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter, value, atol=1e-5)


def test_a_cut_run_goes_on_as_if_it_had_not_been_cut(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    one, batches, _ = vit(tiny)
    whole = wemoe.adapt(one, batches, steps=7, **QUIET)
    two, _, _ = vit(tiny)
    state = tmp_path / "state.safetensors"
    wemoe.adapt(two, batches, steps=3, checkpoint=state, **QUIET)
    three, _, _ = vit(tiny, seed=4)  # its own routers are replaced by the state's
    report = wemoe.adapt(three, batches, steps=7, checkpoint=state, **QUIET)
    assert report.losses == whole.losses
    for found, expected in zip(three.routers.parameters(), one.routers.parameters(), strict=True):
        assert_same("router", found.detach(), expected.detach())
    with pytest.raises(CheckpointError, match=r"is of a run with lr '0.01', this one has '0.5'"):
        wemoe.adapt(three, batches, steps=9, checkpoint=state, lr=0.5, progress=False)


def test_a_cut_run_draws_the_same_shuffled_batches(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """Loaders of several tasks that shuffle with PyTorch's one generator."""

    class Shuffled:
        def __init__(self, batches: list[Any]) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[Any]:
            return iter([self.batches[place] for place in torch.randperm(len(self.batches))])

    one, batches, _ = vit(tiny)
    loaders = {task: Shuffled([*found, *batches["b" if task == "a" else "a"]]) for task, found in batches.items()}
    whole = wemoe.adapt(one, loaders, steps=9, seed=3, **QUIET)
    state = tmp_path / "state.safetensors"
    two, _, _ = vit(tiny)
    wemoe.adapt(two, loaders, steps=5, seed=3, checkpoint=state, data="shuffled", **QUIET)
    report = wemoe.adapt(two, loaders, steps=9, seed=3, checkpoint=state, data="shuffled", **QUIET)
    assert report.losses == whole.losses
    with pytest.raises(CheckpointError, match="is of a run with data 'shuffled', this one has 'others'"):
        wemoe.adapt(two, loaders, steps=9, seed=3, checkpoint=state, data="others", **QUIET)


def test_heads_stand_for_the_models_own(tiny: Callable[[str], Any]) -> None:
    """A task's head of three classes, where the model has two: the loss is that of the model with this head."""
    routed, batches, _ = vit(tiny, reduce="batch")
    generator = torch.Generator().manual_seed(4)
    head = {
        "classifier.weight": torch.randn(3, 16, generator=generator),
        "classifier.bias": torch.randn(3, generator=generator),
    }
    own = copy.deepcopy(routed)
    classifier = own.model.get_submodule("classifier")
    for name, tensor in head.items():
        setattr(classifier, name.removeprefix("classifier."), torch.nn.Parameter(tensor))
    expected = [
        float(entropy(model(**batches[task][0]).logits).detach()) for task, model in (("a", own), ("b", routed))
    ]
    report = wemoe.adapt(routed, batches, steps=1, heads={"a": head}, **QUIET)
    assert report.losses[0] == pytest.approx(expected, rel=1e-6)
    assert routed.model.get_submodule("classifier").out_features == 2
    for heads, message in (
        ({"c": head}, "a head for 'c', which is no task; the tasks are a, b"),
        ({"a": {"score": head["classifier.bias"]}}, "the head of task 'a' has 'score', the model has not"),
    ):
        with pytest.raises(ArgumentError, match=message):
            wemoe.adapt(routed, batches, steps=1, heads=heads, **QUIET)


def test_heads_of_checkpoints_are_read_as_merges_read_them(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model, _, experts = tiny("vit")
    weight = fp8(experts[0]["classifier.weight"], name="classifier.weight", scale="classifier.weight_scale")
    save_file({**experts[0], **weight.stored}, tmp_path / "model.safetensors")
    found = read_checkpoint_head(tmp_path, model, torch.device("cpu"))
    assert found.keys() == {"classifier.weight", "classifier.bias"}
    assert torch.equal(found["classifier.weight"], weight.values["classifier.weight"])
    assert torch.equal(found["classifier.bias"], experts[0]["classifier.bias"])


def test_patience_stops(tiny: Callable[[str], Any]) -> None:
    routed, batches, _ = vit(tiny)
    report = wemoe.adapt(routed, {"a": batches["a"][:1]}, steps=50, lr=0.0, patience=4, progress=False)
    assert report.stopped_early
    assert report.steps == 5


def test_language_models_last_token_and_labels(tiny: Callable[[str], Any]) -> None:
    model, inputs, experts = tiny("llama")
    routed = wemoe.upscale(model, experts, storage=wemoe.StorageSpec(dtype="float32"))
    tokens = inputs["input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    routed.reduce = "batch"
    logits = routed(input_ids=tokens, attention_mask=mask).logits
    expected = float(entropy(torch.stack([logits[0, 6], logits[1, 3], logits[2, 6]])).detach())
    batch = {"input_ids": tokens, "attention_mask": mask}
    report = wemoe.adapt(routed, {"text": [batch]}, steps=1, **QUIET)
    assert report.losses[0][0] == pytest.approx(expected, rel=1e-5)
    again = wemoe.upscale(model, experts, storage=wemoe.StorageSpec(dtype="float32"), reduce="batch")
    logits = again(input_ids=tokens).logits
    expected = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).detach())
    labelled = {"input_ids": tokens, "labels": tokens}
    report = wemoe.adapt(again, {"text": [labelled]}, steps=2, loss="supervised", autocast=torch.bfloat16, **QUIET)
    assert report.losses[0][0] == pytest.approx(expected, rel=0.02)


def test_what_does_not_fit_is_named(tiny: Callable[[str], Any]) -> None:
    routed, batches, teachers = vit(tiny)
    bad = {"pixel_values": torch.full((1, 3, 8, 8), float("nan"))}
    for arguments, error, message in (
        (({},), ArgumentError, "no loaders were given"),
        (({"a": []},), ArgumentError, "the loader of task 'a' gave no batch"),
        (({"a": [bad]},), NonFiniteError, "the loss of task 'a' is nan at step 1"),
    ):
        with pytest.raises(error, match=message):
            wemoe.adapt(routed, *arguments, steps=1, **QUIET)
    with pytest.raises(ArgumentError, match="distillation needs a teacher for each of a, b"):
        wemoe.adapt(routed, batches, loss="distillation", teachers={"a": teachers["a"]}, **QUIET)
    with pytest.raises(ArgumentError, match="has no labels; give"):
        wemoe.adapt(routed, batches, steps=1, loss="supervised", **QUIET)
    with pytest.raises(ArgumentError, match=r"would need loss scaling; give torch\.bfloat16 or None"):
        wemoe.adapt(routed, batches, steps=1, autocast=torch.float16, **QUIET)
