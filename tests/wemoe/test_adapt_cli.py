"""`pymerge wemoe adapt`: data sets and heads from files, the same routers as the library's, runs that go on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pymerge import wemoe
from pymerge.errors import CheckpointError
from pymerge.testing.compare import assert_same
from pymerge.wemoe.datasets import read_dataset
from pymerge.wemoe.heads import read_feature_head
from tests.helpers.checkpoints import pymerge, start

pytestmark = pytest.mark.slow

ROUTER = "wemoe-router.safetensors"


@pytest.fixture
def vit(tiny: Callable[[str], Any], tmp_path: Path) -> Path:
    """A folder with a WEMoE directory `model` of a ViT, its experts `expert-a`, `expert-b`, and data sets of both."""
    model, _, experts = tiny("vit")
    routed = wemoe.upscale(model, dict(zip("ab", experts, strict=False)), storage=wemoe.StorageSpec(dtype="float32"))
    wemoe.save(routed, tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    for task, expert in zip("ab", experts, strict=False):
        twin, _, _ = tiny("vit")
        twin.load_state_dict(expert)
        # A head of its own, with three classes where the model has two.
        twin.classifier = torch.nn.Linear(16, 3)
        twin.config.num_labels = 3
        twin.save_pretrained(tmp_path / f"expert-{task}")
        save_file(
            {
                "pixel_values": torch.randn(10, 3, 8, 8, generator=generator),
                "labels": torch.arange(10) % 3,
            },
            tmp_path / f"{task}.safetensors",
        )
    return tmp_path


def arguments(folder: Path, *more: str, model: str = "model") -> list[str]:
    data = [f"--data={task}={folder / task}.safetensors" for task in "ab"]
    return ["wemoe", "adapt", str(folder / model), *data, "--batch-size=4", "--lr=0.01", "--device=cpu", *more]


def heads(folder: Path) -> list[str]:
    return [f"--head={task}={folder / f'expert-{task}'}" for task in "ab"]


def loaded(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / ROUTER)


@pytest.mark.parametrize("loss", ["entropy", "choice", "supervised", "distillation"])
def test_routers_are_those_that_the_library_adapts(vit: Path, loss: str) -> None:
    routed = wemoe.load(vit / "model", dtype=torch.float32)
    sets = {task: read_dataset(vit / f"{task}.safetensors", routed.model, 4) for task in "ab"}
    classifiers = {task: load_file(vit / f"expert-{task}" / "model.safetensors") for task in "ab"}
    names = ("classifier.weight", "classifier.bias")
    own = {task: {name: found[name] for name in names} for task, found in classifiers.items()}
    teachers: Any = {}
    experts = [f"--expert={task}={vit / f'expert-{task}'}" for task in "ab"] if loss == "distillation" else []
    if experts:
        from transformers import ViTForImageClassification

        teachers = {task: ViTForImageClassification.from_pretrained(vit / f"expert-{task}").eval() for task in "ab"}
    settings: dict[str, Any] = {"loss": loss, "teachers": teachers, "heads": own}
    report = wemoe.adapt(routed, sets, steps=6, lr=0.01, seed=5, progress=False, **settings)
    before = {path.name: path.read_bytes() for path in (vit / "model").iterdir()}
    done = pymerge(*arguments(vit, "--steps=6", "--seed=5", f"--loss={loss}", *heads(vit), *experts, "--quiet"))
    assert (done.code, done.out, done.err) == (0, "", "")
    for owner, unit in zip(routed.spec.modules, routed.routers, strict=True):
        for name, value in unit.state_dict().items():
            assert_same(name, loaded(vit)[f"{owner.path}::{name}"], value)
    after = {path.name: path.read_bytes() for path in (vit / "model").iterdir() if path.is_file()}
    assert {name for name in before if before[name] != after[name]} == {ROUTER}
    assert sum(report.losses[-1]) < sum(report.losses[0])


def test_a_killed_run_goes_on_as_if_it_had_not_been(vit: Path) -> None:
    whole = vit / "whole.safetensors"
    command = arguments(vit, "--steps=160", *heads(vit))
    assert pymerge(*command, f"--out={whole}").code == 0
    untouched = loaded(vit)
    running = start(*command)
    state = vit / "model" / ".wemoe-router.adapting.safetensors"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    for name, value in loaded(vit).items():
        assert_same(name, value, untouched[name])
    refused = pymerge(*command, "--seed=1")
    assert refused.code == CheckpointError.exit_code
    assert "is of a run with seed '0', this one has '1'" in refused.err
    done = pymerge(*command)
    assert done.code == 0
    assert "160 steps; loss of the first and last batch: a " in done.out
    assert not state.exists()
    assert (vit / "model" / ROUTER).read_bytes() == whole.read_bytes()


def test_features_go_through_a_cosine_head(vit: Path, tmp_path: Path) -> None:
    """A model that transformers does not have, by a function of the user's, and heads as CLIP's."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.mlp = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 4))\n"
        "    def forward(self, images):\n"
        "        return self.mlp(images)\n"
        "made = 7\n"
    )
    scope: dict[str, Any] = {"__name__": "mine"}
    exec((tmp_path / "mine.py").read_text(), scope)
    torch.manual_seed(1)
    base = scope["Block"]()
    experts = [{name: value + 0.1 * torch.randn_like(value) for name, value in base.state_dict().items()}] * 2
    routed = wemoe.upscale(base, dict(zip("ab", experts, strict=True)), storage=wemoe.StorageSpec(dtype="float32"))
    wemoe.save(routed, tmp_path / "small")
    for task in "ab":
        np.savez(tmp_path / f"{task}.npz", images=torch.randn(9, 4).numpy())
    head = {"weight": torch.randn(3, 4), "mean": torch.randn(4), "scale": torch.tensor(5.0)}
    save_file(head, tmp_path / "head.safetensors")
    data = [f"--data={task}={tmp_path / task}.npz" for task in "ab"]
    command = ["wemoe", "adapt", str(tmp_path / "small"), *data, "--steps=3", f"--head=a={tmp_path}/head.safetensors"]
    assert (
        pymerge(*command, "--head=b=" + str(tmp_path / "head.safetensors"), f"--model={tmp_path}/mine.py:Block").code
        == 0
    )

    def logits(task: str, features: Any) -> Tensor:
        moved = F.normalize(features - head["mean"], dim=1)
        return 5.0 * moved @ F.normalize(head["weight"], dim=1).T

    sets = {task: read_dataset(tmp_path / f"{task}.npz", routed.model, 16) for task in "ab"}
    wemoe.adapt(routed, sets, steps=3, logits=logits, progress=False)
    found = load_file(tmp_path / "small" / ROUTER)
    expected = routed.routers[0].state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[f"mlp::{name}"], value, atol=1e-6)
    for model, message in ((f"{tmp_path}/mine.py:gone", "has no function 'gone'"), ("mine:f", "give FILE.py:FUNCTION")):
        refused = pymerge(*command, f"--model={model}")
        assert (refused.code, len(refused.errors)) == (5, 1)
        assert message in refused.err


def test_options_that_do_not_fit_are_named(vit: Path) -> None:
    text = {
        "data": "--data=a=x",
        "twice": f"--data=a={vit}/b.safetensors",
        "head": "--head=c=x",
        "expert": "--expert=a=x",
    }
    for extra, message in (
        (text["twice"], "--data names task 'a' twice; give one path for each task"),
        ("--data=c", "--data is 'c'; give TASK=PATH"),
        (text["head"], "--head names task 'c', which has no --data; the tasks are a, b"),
        (text["expert"], "--expert is for --loss distillation, the loss is entropy; leave one out"),
        ("--loss=distillation", "needs the expert of task 'a'; give --expert a=DIR"),
        ("--device=gpu", "--device is 'gpu'; choose auto, cpu, cuda or cuda:N"),
        (f"--out={vit}/no/where.safetensors", "is no directory; make it first"),
        (f"--head=a={vit}/a.safetensors", "has no weight of classes x features; write one under this name"),
    ):
        done = pymerge(*arguments(vit, extra))
        assert done.code in (3, 5, 8), done
        assert len(done.errors) == 1
        assert message in done.errors[0]


def test_data_sets_that_do_not_fit_are_named(vit: Path) -> None:
    model = wemoe.load(vit / "model").model
    path = vit / "x.safetensors"
    pixels = torch.zeros(2, 3, 8, 8)
    for tensors, message in (
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "holds no inputs"),
        ({"pixel_value": pixels}, "has no argument 'pixel_value', did you mean 'pixel_values'"),
        ({"images": pixels, "pixel_values": pixels + 1}, "images go alone"),
        ({"images": pixels, "labels": torch.zeros(3, dtype=torch.int64)}, "{'images': 2, 'labels': 3} samples"),
        ({"images": pixels[:0]}, "give at least one"),
        ({"images": pixels, "labels": torch.zeros(2)}, r"labels are torch.float32 \[2\]; give integers"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            read_dataset(path, model, 4)
    (vit / "x.npz").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"write it again with numpy\.savez"):
        read_dataset(vit / "x.npz", model, 4)
    np.savez(vit / "x.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match=r"write it again with numpy\.savez"):
        read_dataset(vit / "x.npz", model, 4)
    with pytest.raises(CheckpointError, match=r"neither .safetensors nor .npz"):
        read_dataset(vit / "x.pkl", model, 4)


def test_pictures_of_bytes_are_scaled_and_integers_are_long(vit: Path) -> None:
    model = wemoe.load(vit / "model").model
    save_file({"images": torch.tensor([[0], [51], [255]], dtype=torch.uint8)}, vit / "x.safetensors")
    found = read_dataset(vit / "x.safetensors", model, 2)
    assert torch.equal(found.inputs["images"], torch.tensor([[0.0], [0.2], [1.0]]))
    torch.manual_seed(0)
    batches = list(found)
    assert [len(batch) for batch in batches] == [2, 1]
    assert sorted(torch.cat(batches).flatten().tolist()) == pytest.approx([0.0, 0.2, 1.0])
    np.savez(vit / "y.npz", pixel_values=np.array([1, 2], dtype=np.int16), labels=np.array([3, 4], dtype=np.uint8))
    second = read_dataset(vit / "y.npz", model, 2)
    assert second.inputs["pixel_values"].dtype == torch.int64
    assert second.labels is not None
    assert second.labels.tolist() == [3, 4]
    assert second.digest() != read_dataset(vit / "y.npz", model, 1).digest()


def test_heads_of_wrong_shapes_are_named(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    for tensors, message in (
        ({"weight": weight, "bias": torch.zeros(4)}, r"'bias' is \[4\], expected \[3\]"),
        ({"weight": weight, "bias": torch.zeros(3), "scale": torch.ones(1)}, "cosines have no bias"),
        ({"weight": weight, "extra": torch.zeros(1)}, "'extra' is .* expected no such tensor"),
    ):
        save_file(tensors, tmp_path / "head.safetensors")
        with pytest.raises(CheckpointError, match=message):
            read_feature_head(tmp_path / "head.safetensors", torch.device("cpu"))
    save_file({"weight": weight, "bias": torch.ones(3)}, tmp_path / "head.safetensors")
    features = torch.randn(2, 4)
    found = read_feature_head(tmp_path / "head.safetensors", torch.device("cpu"))(features)
    assert torch.allclose(found, features @ weight.T + 1, atol=1e-6)
