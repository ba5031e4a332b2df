"""Merges into live modules: what goes on working, what is refused, and what an error leaves behind."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymerge
from pymerge.errors import ArgumentError, NonFiniteError, PlanError
from tests.helpers.adapters import factors, write_adapter
from tests.helpers.checkpoints import fine_tuned, llama, llama_config, write_model

DEVICE = os.environ.get("PYMERGE_TEST_DEVICE", "cpu")


class Block(nn.Module):
    """A small model: an embedding that its head is tied to, linear weights, a norm, and a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("position_ids", torch.arange(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.mlp(self.embed_tokens(tokens))))


def blocks(experts: int = 2) -> tuple[Block, list[Block]]:
    torch.manual_seed(1)
    base = Block().to(DEVICE)
    found = [copy.deepcopy(base) for _ in range(experts)]
    for expert in found:
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return base, found


def states(*modules: nn.Module) -> list[dict[str, Tensor]]:
    return [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]


def expected(
    base: nn.Module, experts: list[Block], method: str = "task_arithmetic", **parameters: Any
) -> dict[str, Tensor]:
    own, *others = states(base, *experts)
    merged = pymerge.merge_state_dicts(own, others, method, **parameters)
    return {name: merged[name] for name in own}


def test_storages_gradients_optimisers_and_ties_stay() -> None:
    base, experts = blocks()
    optimiser = torch.optim.AdamW(base.parameters(), lr=0.1)
    base(torch.arange(4, device=DEVICE)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in base.parameters() if parameter.grad is not None]
    places = [(id(parameter), parameter.data_ptr()) for parameter in base.parameters()]
    merged = expected(base, experts, weight=0.3)
    pymerge.merge_into(base, experts, "task_arithmetic", weight=0.3)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in base.state_dict().items())
    assert [(id(parameter), parameter.data_ptr()) for parameter in base.parameters()] == places
    assert base.lm_head.weight is base.embed_tokens.weight
    found = [parameter.grad for parameter in base.parameters()]
    assert all(torch.equal(one, two) for one, two in zip(found, gradients, strict=True) if one is not None)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in base.parameters())
    before = base.norm.weight.clone()
    optimiser.step()
    assert not torch.equal(base.norm.weight, before)


def test_autograd_sees_that_weights_have_changed() -> None:
    base, experts = blocks()
    loss = base(torch.arange(4, device=DEVICE)).square().sum()
    merger = pymerge.Merger({name: tensor.clone() for name, tensor in base.state_dict().items()}, experts, "linear")
    merger.merge_into(base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_modules_go_on_without_compiling_again() -> None:
    base, experts = blocks()
    merged = copy.deepcopy(base)
    merged.load_state_dict(expected(base, experts, weight=0.3))
    compiles = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compiles
        compiles += 1
        return graph.forward

    compiled = torch.compile(base, backend=backend)
    tokens = torch.arange(4, device=DEVICE)
    before = compiled(tokens)
    first = compiles
    pymerge.merge_into(compiled, experts, "task_arithmetic", weight=0.3)
    after = compiled(tokens)
    assert compiles == first > 0
    assert torch.equal(after, merged(tokens))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("wrap", ["data parallel", "module. before names", "_orig_mod. inside names"])
def test_names_of_wrappers(wrap: str) -> None:
    base, experts = blocks()
    merged = expected(base, experts, weight=0.3)
    if wrap == "data parallel":
        pymerge.merge_into(
            nn.DataParallel(base), [nn.DataParallel(expert) for expert in experts], "task_arithmetic", weight=0.3
        )
    elif wrap == "module. before names":
        state = {f"module.{name}": tensor for name, tensor in base.state_dict().items()}
        pymerge.merge_into(state, experts, "task_arithmetic", weight=0.3)
    else:
        theirs = [
            {name.replace("mlp.", "mlp._orig_mod."): tensor for name, tensor in expert.state_dict().items()}
            for expert in experts
        ]
        base.mlp = torch.compile(base.mlp)  # type: ignore[assignment]
        pymerge.merge_into(base, theirs, "task_arithmetic", weight=0.3)
        base.mlp = base.mlp._orig_mod
    assert all(torch.equal(tensor, merged[name]) for name, tensor in base.state_dict().items())


def test_names_choose_what_is_merged() -> None:
    base, experts = blocks()
    (before,), merged = states(base), expected(base, experts, weight=0.5)
    pymerge.merge_into(base, experts, "task_arithmetic", names=["mlp", "norm.bias"], weight=0.5)
    for name, tensor in base.state_dict().items():
        chosen = "mlp" in name or name == "norm.bias"
        assert torch.equal(tensor, (merged if chosen else before)[name]), name
    for names, message in ((["mpl"], "did you mean 'mlp'"), ("mlp", "give a list"), ([], "has no value")):
        with pytest.raises(ArgumentError, match=message):
            pymerge.merge_into(base, experts, "task_arithmetic", names=names, weight=0.5)


def test_a_base_beside_the_module() -> None:
    base, experts = blocks()
    target = copy.deepcopy(experts[0])
    merged = expected(base, experts, weight=0.3)
    pymerge.merge_into(target, experts, "task_arithmetic", base=base, weight=0.3)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in target.state_dict().items())


def test_a_target_of_another_architecture() -> None:
    base, experts = blocks()
    merger = pymerge.Merger(base, experts, "task_arithmetic")
    other = copy.deepcopy(base)
    other.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    kept = states(other)[0]
    with pytest.raises(ArgumentError, match=r"the target: mlp\.2\.weight has shape \[4, 16\], in the merge \[8, 16\]"):
        merger.merge_into(other)
    other = copy.deepcopy(base)
    other.more = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(
        ArgumentError, match=r"it has 2 tensors: more\.weight, more\.bias, of which the merge has nothing"
    ):
        merger.merge_into(other)
    other.more = None  # type: ignore[assignment]
    other.norm = None  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match=r"it lacks 2 tensors: norm\.weight, norm\.bias"):
        merger.merge_into(other)
    other = copy.deepcopy(base)
    other.mlp[0].weight = nn.Parameter(torch.ones(16, 8).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ArgumentError, match=r"mlp\.0\.weight is F8_E4M3, in which nothing can be computed"):
        merger.merge_into(other)
    assert kept["norm.weight"].equal(states(base)[0]["norm.weight"])
    tensors = dict(base.state_dict())
    with pytest.raises(ArgumentError, match=r"norm\.weight: elements that lie in one place .*; pass a clone\(\)"):
        merger.merge_into({**tensors, "norm.weight": torch.ones(1).expand(8)})


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    base, experts = blocks()
    with torch.device("meta"):
        meta = Block()
    with pytest.raises(ArgumentError, match=r"'position_ids' is on the meta device.*; load the model without"):
        pymerge.merge_into(meta, experts, "linear")
    quantised = copy.deepcopy(base)
    quantised.mlp[0].weight = nn.Parameter(torch.ones(16, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ArgumentError, match=r"'mlp\.0\.weight' is quantised \(Parameter, torch\.int8\); load the model"
    ):
        pymerge.merge_into(quantised, experts, "linear")
    with pytest.raises(ArgumentError, match=r"'a' is sparse .*; call to_dense\(\)"):
        pymerge.merge_into({"a": torch.eye(2).to_sparse()}, [{"a": torch.eye(2)}], "linear")
    with pytest.raises(ArgumentError, match=r"'a' has complex numbers.*view_as_real"):
        pymerge.merge_into({"a": torch.eye(2) * 1j}, [{"a": torch.eye(2)}], "linear")
    with pytest.raises(ArgumentError, match="'a' is a int; pass tensors by name"):
        pymerge.merge_into({"a": 1}, [{"a": torch.eye(2)}], "linear")  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match="the base has no tensors"):
        pymerge.merge_into({}, [{"a": torch.eye(2)}], "linear")
    with pytest.raises(PlanError, match=r"nothing\.safetensors. not found"):
        pymerge.merge_into(base, [tmp_path / "nothing.safetensors"], "linear")

    class Copies(Block):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}

    with pytest.raises(ArgumentError, match=r"its state_dict gives '\w+(\.\w+)?' as a copy"):
        pymerge.merge_into(Copies(), experts, "linear")


def test_sharded_parameters_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    base, experts = blocks()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = copy.deepcopy(base).cpu()
        sharded.mlp[0].weight = nn.Parameter(distribute_tensor(sharded.mlp[0].weight.data, mesh, [Replicate()]))
        with pytest.raises(ArgumentError, match=r"'mlp\.0\.weight' is a DTensor.*; merge before the model is sharded"):
            pymerge.merge_into(sharded, experts, "linear")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("atomic", [False, True])
def test_what_an_error_leaves_behind(atomic: bool) -> None:
    base, experts = blocks()
    with torch.no_grad():
        experts[1].norm.weight[3] = torch.inf
    before = states(base)[0]
    with pytest.raises(NonFiniteError, match=r"expert 1: tensor 'norm\.weight' has 1 values") as caught:
        pymerge.merge_into(base, experts, "task_arithmetic", atomic=atomic, weight=0.5)
    after = states(base)[0]
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    said = "overwritten are 6 tensors: position_ids, embed_tokens.weight, mlp.0.weight"
    assert (said in str(caught.value)) is not atomic
    if atomic:
        assert not changed
    else:
        assert {"embed_tokens.weight", "mlp.0.weight", "mlp.2.bias"} <= set(changed)
        assert "norm.bias" not in changed


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties", "wudi_flow", "ace"])
def test_adapters_are_what_they_are_in_files(method: str, tmp_path: Path) -> None:
    base = llama()
    modules = [f"model.layers.{block}.mlp.up_proj" for block in range(2)] + ["model.layers.0.self_attn.q_proj"]
    write_model(tmp_path / "base", base, config=llama_config(base))
    adapters = [write_adapter(tmp_path / f"a{seed}", factors(base, modules, seed=seed)) for seed in range(2)]
    # linear, with weights that do not add up to 1: of models, whose base is not read for them.
    parameters = {"ties": {"density": 0.5}, "linear": {"normalize": False}}.get(method, {})
    weights = {"weight": 0.4} if method in ("task_arithmetic", "linear", "ties") else {}
    config = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(adapter)} for adapter in adapters],
        "parameters": parameters | weights,
    }
    pymerge.merge(config, tmp_path / "out", progress=False)
    from safetensors.torch import load_file

    files = load_file(tmp_path / "out" / "model.safetensors")
    live = {name: tensor.clone().to(DEVICE) for name, tensor in base.items()}
    pymerge.merge_into(live, adapters, method, device="cpu", **parameters, **weights)
    assert all(torch.equal(live[name].cpu(), files[name]) for name in files)
    merger = pymerge.Merger(tmp_path / "base", adapters, method, **parameters)
    merger.merge(**({"weight": 0.9} if weights else {}))
    found = merger.merge(**weights)
    assert all(torch.equal(found[name], files[name]) for name in files)
    (again,) = merger.merge_many([weights])
    assert all(torch.equal(again[name], files[name]) for name in files)


def test_experts_of_several_kinds_together(tmp_path: Path) -> None:
    base = llama()
    experts = [fine_tuned(base, seed) for seed in range(3)]
    write_model(tmp_path / "file", experts[1])
    module = nn.Module()
    for name, tensor in experts[2].items():
        owner = module
        *parts, last = name.split(".")
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        owner.register_parameter(last, nn.Parameter(tensor.clone()))
    live = {name: tensor.clone() for name, tensor in base.items()}
    pymerge.merge_into(live, [experts[0], tmp_path / "file", module], "ties", weight=[1.0, 2.0, 3.0], density=0.5)
    merged = pymerge.merge_state_dicts(base, experts, "ties", weight=[1.0, 2.0, 3.0], density=0.5)
    assert all(torch.equal(live[name], merged[name]) for name in merged)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_stays_allocated() -> None:
    base = {name: tensor.cuda() for name, tensor in llama(hidden=256, inner=512).items()}
    experts = [{name: tensor + 0.01 for name, tensor in base.items()} for _ in range(2)]
    target = {name: tensor.clone() for name, tensor in base.items()}
    merger = pymerge.Merger(base, experts, "task_arithmetic")
    merger.merge_into(target, weight=0.2)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    merger.merge_into(target, weight=0.4)
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.max_memory_allocated() - held <= max(tensor.nbytes for tensor in base.values())
    merged = pymerge.merge_state_dicts(base, experts, "task_arithmetic", weight=0.4)
    assert all(torch.equal(target[name], merged[name]) for name in merged)
