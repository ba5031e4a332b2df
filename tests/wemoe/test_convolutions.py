"""Convolutions mixed per sample, against plain models merged by each sample's gates; saved, loaded and built."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pymerge
from pymerge import wemoe
from pymerge.errors import ArgumentError, CheckpointError
from pymerge.testing.compare import assert_same
from tests.helpers.routed import FLOAT32, relative, spread

STORAGES = (
    FLOAT32,
    wemoe.StorageSpec(kind="pruned", ratio=0.4, dtype="float32"),
    wemoe.StorageSpec(kind="low_rank", rank=3, dtype="float32"),
)
QUIET: dict[str, Any] = {"progress": False, "device": "cpu"}


class Net(nn.Module):
    """A stem of convolutions of several kinds with a norm between them, then an MLP on its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect", groups=2, bias=False),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 8, (1, 3), dilation=(1, 2), groups=8),
        )
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.stem(x).flatten(2).mT).mean(1)
        return out


def moved(model: nn.Module, seed: int, by: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + by * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()
    }


def net(kind: Callable[[], nn.Module] = Net) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """A model and its experts."""
    torch.manual_seed(0)
    model = kind().eval()
    return model, {name: moved(model, seed) for seed, name in enumerate("abc", 1)}


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 12, 12, generator=torch.Generator().manual_seed(9))


def merged(model: nn.Module, routed: wemoe.RoutedModel, experts: Any, row: int) -> nn.Module:
    """The oracle: in float64, the base's weights and the experts' differences by one sample's gates, W_0 + sum_t g_t
    (W_t - W_0) in the modules, and the routed model's own tensors elsewhere."""
    gates = routed.gates()
    plain = copy.deepcopy(model).double()
    state = {name: value.double() for name, value in routed.static().state_dict().items()}
    base = model.state_dict()
    for module in routed.spec.modules:
        for name in module.parameters:
            state[name] = base[name].double() + sum(
                float(gate) * (expert[name].double() - base[name].double())
                for gate, expert in zip(gates[module.path][row], experts.values(), strict=True)
            )
    plain.load_state_dict(state)
    return plain


def test_each_sample_is_its_own_merged_model() -> None:
    model, experts = net()
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32, modules="stem|mlp"))
    assert [(module.path, module.hidden_size) for module in routed.spec.modules] == [("stem", 6), ("mlp", 8)]
    x = images()
    found = routed(x)
    assert float(routed.gates()["stem"].std(0).max()) > 1e-2  # samples differ
    for row in range(len(x)):
        expected = merged(model, routed, experts, row)(x[row : row + 1].double())
        assert relative(found[row : row + 1], expected) < 1e-5
    for row in range(len(x)):
        assert relative(routed(x[row : row + 1]), found[row : row + 1]) < 1e-5


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(axes: int) -> None:
    kind: Any = {1: nn.Conv1d, 3: nn.Conv3d}[axes]

    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(kind(2, 4, 3, stride=2, padding=1), nn.ReLU(), kind(4, 3, 2, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.stem(x).flatten(2).sum(2)
            return out

    model, experts = net(Volume)
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32, modules="stem"))
    x = torch.randn(3, 2, *[7] * axes)
    found = routed(x)
    for row in range(len(x)):
        assert relative(found[row : row + 1], merged(model, routed, experts, row)(x[row : row + 1].double())) < 1e-5
    with pytest.raises(ArgumentError, match=r"stem: a convolution got an input of shape .*; give a batch of samples"):
        routed(x[0])


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.kind)
def test_merge_for_a_batch_and_one_row_of_gates(storage: Any) -> None:
    model, experts = net()
    routed = spread(wemoe.upscale(model, experts, storage=storage, modules="stem|mlp", reduce="batch"))
    x = images()
    plain = routed.merge_for(x)
    assert {type(module) for module in plain.modules()} == {type(module) for module in model.modules()}
    assert relative(routed(x), plain(x)) < 1e-5
    routed.reduce = "sample"
    found = routed(x)
    for row in range(len(x)):
        gates = {path: rows[row] for path, rows in routed.gates().items()}
        assert relative(found[row], routed.static(gates)(x[row : row + 1])[0]) < 1e-5


@pytest.mark.parametrize("reduce", ["sample", "batch"])
def test_router_gradient_by_differences(reduce: Any) -> None:
    """Through the gates of both layers, and the second router's input."""
    model, experts = net()
    routed = wemoe.upscale(model.double(), experts, storage=FLOAT32, modules=r"stem\.[02]|mlp", reduce=reduce)
    routed, x = spread(routed).double(), images().double()

    def loss() -> Tensor:
        result: Tensor = routed(x).square().sum()
        return result

    loss().backward()
    for parameter in routed.routers.parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = loss()
            parameter -= 2e-6 * direction
            slope = float(above - loss()) / 2e-6
            parameter += 1e-6 * direction
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5, abs=1e-7)


def test_routers_see_the_first_convolution_of_the_base() -> None:
    model, experts = net()
    routed = spread(wemoe.upscale(model, experts, modules="stem"))
    x = images()
    routed(x)
    seen = model.get_submodule("stem.0")(x).flatten(2).transpose(1, 2)
    assert_same("gates", routed.gates()["stem"], routed.routers[0](seen))
    layer = routed.model.get_submodule("stem.0")
    assert (layer.stride, layer.kernel_size, layer.out_channels) == ((2, 2), (3, 3), 6)


def test_bfloat16_and_autocast() -> None:
    model, experts = net()
    routed = spread(wemoe.upscale(model, experts, modules="stem|mlp"))
    expected = routed(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(routed(images()), expected) < 0.05
    routed.model.to(torch.bfloat16)
    assert relative(routed(images().bfloat16()), expected) < 0.05


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.kind)
def test_round_trip_and_build(storage: Any, tmp_path: Path) -> None:
    """A saved model, and one built from checkpoints on disk, are the upscaled one, bit for bit."""
    model, experts = net()
    for name, state in {"base": model.state_dict(), **experts}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    routed = wemoe.upscale(model, experts, storage=storage, modules="stem|mlp", seed=4)
    wemoe.save(routed, tmp_path / "saved")
    models = [{"model": str(tmp_path / name)} for name in experts]
    section = {
        "modules": "stem|mlp", "seed": 4, "storage": storage.model_dump(include={"kind", "dtype", "ratio", "rank"})
    }  # fmt: skip
    config = {"base_model": str(tmp_path / "base"), "models": models, "wemoe": section}
    report = wemoe.build(config, tmp_path / "built", model=Net(), **QUIET)
    assert report.spec.version == 2
    expected = routed(images())
    for folder in ("saved", "built"):
        assert_same(folder, wemoe.load(tmp_path / folder, model=Net())(images()), expected)
    saved = json.loads((tmp_path / "saved/wemoe.json").read_text())
    assert saved["modules"][0]["parameters"]["stem.2.weight"] == [8, 3, 3, 3]
    assert saved["storage"] == json.loads((tmp_path / "built/wemoe.json").read_text())["storage"]
    saved["version"] = 1
    (tmp_path / "saved/wemoe.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="version 1 has no convolutions, and a module has one"):
        wemoe.read_spec(tmp_path / "saved")
    assert pymerge.wemoe is wemoe


def test_directories_of_version_1_are_read(tmp_path: Path) -> None:
    model, experts = net()
    routed = wemoe.upscale(model, experts, modules="mlp")
    wemoe.save(routed, tmp_path / "saved")
    path = tmp_path / "saved/wemoe.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    assert_same("output", wemoe.load(tmp_path / "saved", model=Net())(images()), routed(images()))


class Scaled(nn.Conv2d):
    """A convolution that does not use its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(2, 6, 3), Scaled(2, 6, 3), nn.Embedding(4, 6)], ids=type)
def test_what_cannot_be_routed_is_named(layer: nn.Module) -> None:
    model, _ = net()
    model.stem[0] = layer  # type: ignore[index,operator]
    experts = {"a": moved(model, 1)}
    with pytest.raises(ArgumentError, match=r"'stem' holds stem.0.weight, and only linear layers and convolutions"):
        wemoe.upscale(model, experts, modules="stem")
    with pytest.raises(ArgumentError, match="has no module that '' matches as a whole"):
        wemoe.upscale(model, experts, modules="")


def test_choice_finds_the_expert_of_each_input_without_labels() -> None:
    """Textures tell tasks apart: the stem's router chooses the task's expert, for inputs that it has not seen."""
    model, experts = net()
    routed = wemoe.upscale(model, experts, storage=FLOAT32, modules="stem|mlp", init_lambda=0.1)
    frozen = {name: value.clone() for name, value in routed.model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)

    def textures(task: str) -> Tensor:
        x = torch.randn(16, 2, 12, 12, generator=generator)
        return {"a": x, "b": x.cumsum(3) / 3, "c": x.cumsum(2) / 3}[task]

    batches = {task: [textures(task) for _ in range(8)] for task in "abc"}
    report = wemoe.adapt(routed, batches, steps=150, lr=0.03, loss="choice", progress=False)
    assert sum(report.losses[-1]) < 0.3 * sum(report.losses[0])
    for place, task in enumerate("abc"):
        routed(textures(task))
        assert float((routed.gates()["stem"].argmax(1) == place).double().mean()) > 0.9
    for name, value in routed.model.state_dict().items():
        assert_same(name, value, frozen[name])


def test_the_loss_of_choice_is_the_distance_from_the_own_expert() -> None:
    """At inputs that the own expert's modules would have, and with no gradient but the routers'."""
    model, experts = net()
    routed = spread(
        wemoe.upscale(model, experts, storage=FLOAT32, modules="stem|mlp", router=wemoe.RouterSpec(depth=1))
    )
    x, seen = images(), {}
    alone = routed.static({path: torch.tensor([0.0, 1.0, 0.0]) for path in ("stem", "mlp")})
    alone.get_submodule("mlp").register_forward_pre_hook(lambda module, args: seen.update(mlp=args[0]))
    alone(x)
    seen["stem"] = model.get_submodule("stem.0")(x).flatten(2).transpose(1, 2)
    wanted = torch.tensor([0.0, 1.0, 0.0])
    distances = [
        (router(seen[path]) - wanted).square().sum(1).mean()
        for router, path in zip(routed.routers, ("stem", "mlp"), strict=True)
    ]
    report = wemoe.adapt(copy.deepcopy(routed), {"b": [x]}, steps=1, loss="choice", progress=False)
    assert report.losses[0][0] == pytest.approx(float(sum(distances).detach()) / 2, rel=1e-5)
    with pytest.raises(ArgumentError, match=r"task 'z' is no expert, .*; name tasks as the experts: a, b, c"):
        wemoe.adapt(routed, {"z": [x]}, loss="choice", progress=False)
