"""Upscaled transformers against the static merge, against a static model of each sample, and saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymerge
from pymerge import wemoe
from pymerge.errors import ArgumentError, CheckpointError
from pymerge.testing.compare import assert_same
from tests.helpers.routed import FLOAT32, relative, spread

NAMES = ("llama", "bert", "vit", "gpt2", "t5")
ROUTERS = (
    wemoe.RouterSpec(depth=0),
    wemoe.RouterSpec(depth=1),
    wemoe.RouterSpec(depth=2),
    wemoe.RouterSpec(depth=2, shared=True, layer_code=True),
)


def static_merge(model: nn.Module, experts: list[dict[str, Tensor]], weight: float) -> nn.Module:
    """Task arithmetic on everything, in float64 before it is rounded."""
    merged = copy.deepcopy(model)
    state = {}
    for name, value in model.state_dict().items():
        wide = value.double() + weight * sum(expert[name].double() - value.double() for expert in experts)
        state[name] = wide.to(value.dtype) if value.is_floating_point() else value
    merged.load_state_dict(state)
    return merged


def samples(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each sample of a batch as a batch of its own."""
    count = len(next(iter(inputs.values())))
    return [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(count)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_without_router_weights_it_is_task_arithmetic(tiny: Callable[[str], Any], name: str, router: Any) -> None:
    model, inputs, experts = tiny(name)
    routed = wemoe.upscale(model, experts, router=router, storage=FLOAT32, init_lambda=0.3)
    with torch.no_grad():
        for key, parameter in routed.routers.named_parameters():
            if key.endswith("weight"):
                parameter.zero_()
    expected = static_merge(model, experts, 0.3)(**inputs).logits
    assert relative(routed(**inputs).logits, expected) < 1e-6
    gates = routed.gates()
    assert len(gates) == (4 if name == "t5" else 2)
    assert all(torch.equal(g, torch.full_like(g, 0.3)) for g in gates.values())


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_is_its_own_static_model(tiny: Callable[[str], Any], name: str) -> None:
    """The oracle: plain models merged by each sample's gates; and samples do not depend on their batch."""
    model, inputs, experts = tiny(name)
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32))
    logits = routed(**inputs).logits
    gates = routed.gates()
    assert float(next(iter(gates.values())).std(0).max()) > 1e-3  # samples differ
    for row, one in enumerate(samples(inputs)):
        plain = routed.static({path: rows[row] for path, rows in gates.items()})
        assert type(plain) is type(model)
        assert relative(logits[row : row + 1], plain(**one).logits) < 1e-5
        assert relative(routed(**one).logits, logits[row : row + 1]) < 1e-5
        for path, rows in routed.gates().items():
            assert torch.allclose(rows[0], gates[path][row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_files(tiny: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    model, inputs, experts = tiny(name)
    stores = (FLOAT32, wemoe.StorageSpec(kind="pruned", ratio=0.7), wemoe.StorageSpec(kind="low_rank", rank=3))
    for number, storage in enumerate(stores):
        router = wemoe.RouterSpec(depth=1, shared=number == 1, layer_code=number == 1)
        if name == "t5" and number == 1:
            router = wemoe.RouterSpec(depth=0, shared=True)
        routed = spread(wemoe.upscale(model, experts, storage=storage, router=router))
        folder = tmp_path / storage.kind
        wemoe.save(routed, folder, max_shard_bytes=4000)
        loaded = wemoe.load(folder)
        assert_same("logits", loaded(**inputs).logits, routed(**inputs).logits)
        spec = wemoe.read_spec(folder)
        assert loaded.spec == spec
        sizes = sum(file.stat().st_size for file in folder.glob("wemoe-task-vectors-*.safetensors"))
        assert 0 < spec.storage.stored_bytes <= sizes
        assert storage.kind != "dense" or spec.storage.stored_bytes == spec.storage.dense_bytes
        state = {key: value.clone() for key, value in loaded.state_dict().items()}
        fresh = wemoe.upscale(model, experts, storage=storage, router=router, seed=9)
        fresh.load_state_dict(routed.state_dict())
        assert_same("state dict", fresh(**inputs).logits, routed(**inputs).logits)
        assert state.keys() == loaded.state_dict().keys()


@pytest.mark.parametrize("name", NAMES)
def test_merge_for_a_batch_is_the_batch_reduced_model(tiny: Callable[[str], Any], name: str) -> None:
    model, inputs, experts = tiny(name)
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32))
    plain = routed.merge_for(**inputs)
    assert routed.reduce == "sample"
    assert type(plain) is type(model)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in model.named_parameters()}
    routed.reduce = "batch"
    assert relative(plain(**inputs).logits, routed(**inputs).logits) < 1e-5
    assert all(rows.shape == (1, 3) for rows in routed.gates().values())


def test_router_gradient_by_differences(tiny: Callable[[str], Any]) -> None:
    model, inputs, experts = tiny("vit")
    for reduce in ("sample", "batch"):
        routed = spread(wemoe.upscale(model.double(), experts, storage=FLOAT32, reduce=reduce)).double()
        wide = {"pixel_values": inputs["pixel_values"].double()}

        def loss(routed: wemoe.RoutedModel = routed, wide: dict[str, Tensor] = wide) -> Tensor:
            result: Tensor = routed(**wide).logits.square().sum()
            return result

        loss().backward()
        assert all(p.grad is None for p in routed.model.parameters())
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


def test_router_files(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model, inputs, experts = tiny("bert")
    one = spread(wemoe.upscale(model, experts))
    two = wemoe.upscale(model, experts, seed=3)
    one.save_router(tmp_path / "r.safetensors")
    two.load_router(tmp_path / "r.safetensors")
    assert_same("logits", two(**inputs).logits, one(**inputs).logits)
    other = wemoe.upscale(model, experts, router=wemoe.RouterSpec(depth=1))
    with pytest.raises(CheckpointError, match=r"tensor '.*hidden.bias' belongs to no router of wemoe.json"):
        other.load_router(tmp_path / "r.safetensors")
    fewer = wemoe.upscale(model, experts[:2])
    with pytest.raises(CheckpointError, match=r"is torch.float32 \[3, 16\], wemoe.json says \[2, 16\]"):
        fewer.load_router(tmp_path / "r.safetensors")


def test_copies_and_gradient_free_weights(tiny: Callable[[str], Any]) -> None:
    model, inputs, experts = tiny("llama")
    routed = spread(wemoe.upscale(model, experts))
    twin = copy.deepcopy(routed)
    assert_same("copy", twin(**inputs).logits, routed(**inputs).logits)
    with torch.no_grad():
        next(twin.routers.parameters()).add_(1.0)
    assert relative(twin(**inputs).logits, routed(**inputs).logits) > 1e-6
    assert {name.split(".")[0] for name, p in routed.named_parameters() if p.requires_grad} == {"routers"}
    assert pymerge.wemoe is wemoe


def test_bfloat16_model(tiny: Callable[[str], Any]) -> None:
    model, inputs, experts = tiny("llama")
    routed = spread(wemoe.upscale(model, experts))
    expected = routed(**inputs).logits
    routed.model.to(torch.bfloat16)
    assert relative(routed(**inputs).logits, expected) < 0.03


def test_what_does_not_fit_is_named(tiny: Callable[[str], Any]) -> None:
    model, _, experts = tiny("bert")
    with pytest.raises(ArgumentError, match="no experts were given"):
        wemoe.upscale(model, [])
    with pytest.raises(ArgumentError, match=r"expert 'a' has no '.*'; give experts fine-tuned from this base"):
        wemoe.upscale(model, {"a": {}})
    with pytest.raises(ArgumentError, match="no module that 'nothing' matches as a whole; give modules='REGEX'"):
        wemoe.upscale(model, experts, modules="nothing")
    with pytest.raises(ArgumentError, match=r"'bert.embeddings' holds bert.embeddings.*, and only linear layers"):
        wemoe.upscale(model, experts, modules="bert.embeddings")
    routed = wemoe.upscale(model, experts, modules=r"bert\.encoder\.layer\.0\.intermediate")
    assert [unit.path for unit in routed.units] == ["bert.encoder.layer.0.intermediate"]
    assert set(routed.spec.modules[0].parameters) == {
        f"bert.encoder.layer.0.{part}.dense.{kind}"
        for part in ("intermediate", "output")
        for kind in ("weight", "bias")
    }
    with pytest.raises(ArgumentError, match="has had no input yet; call the model first"):
        routed.gates()
    with pytest.raises(ArgumentError, match="reduce is 'mean'; choose sample or batch"):
        routed.reduce = "mean"


@pytest.mark.parametrize("name", NAMES)
def test_reducing_over_a_batch_of_one_changes_nothing(tiny: Callable[[str], Any], name: str) -> None:
    model, inputs, experts = tiny(name)
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32))
    one = samples(inputs)[1]
    expected = routed(**one).logits
    routed.reduce = "batch"
    assert_same("logits", routed(**one).logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_limits_of_the_prune_ratio(tiny: Callable[[str], Any], name: str) -> None:
    """Ratio 1 leaves the base's MLPs in the static merge, whatever the gates; ratio 0 all but the smallest entries."""
    model, inputs, experts = tiny(name)
    nothing = wemoe.StorageSpec(kind="pruned", ratio=1.0, dtype="float32")
    routed = spread(wemoe.upscale(model, experts, storage=nothing))
    assert relative(routed(**inputs).logits, routed.static()(**inputs).logits) < 1e-6
    everything = wemoe.StorageSpec(kind="pruned", ratio=0.0, dtype="float32")
    found = spread(wemoe.upscale(model, experts, storage=everything))(**inputs).logits
    state = model.state_dict()
    for expert in experts:
        for parameter in (name for module in routed.spec.modules for name in module.parameters):
            tau = expert[parameter] - state[parameter]
            smallest = tau.abs().flatten().argmin()
            expert[parameter].view(-1)[smallest] = state[parameter].view(-1)[smallest]
    expected = spread(wemoe.upscale(model, experts, storage=FLOAT32))(**inputs).logits
    assert relative(found, expected) < 1e-5
    assert relative(found, routed(**inputs).logits) > 1e-3
