"""Properties of solvers and averages through the Python interface: layouts, stacks, state dicts, mistakes."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

import pymerge
from pymerge.errors import ArgumentError, ConfigError, NonFiniteError
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_a_task_that_did_not_touch_the_weight_changes_nothing(method):
    base, experts = make_weights(20, 24, 3)
    without = pymerge.merge_tensors(base, experts, method)
    with_zero = pymerge.merge_tensors(base, [*experts[:2], base.clone(), experts[2]], method)
    torch.testing.assert_close(with_zero, without, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["wudi", "ace", "task_arithmetic", "linear"])
@pytest.mark.parametrize("shape", [(6, 5), (5,), (), (0, 4), (4, 0), (1, 1), (2, 3, 4)], ids=str)
def test_experts_equal_to_the_base_give_the_base(method, shape):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    merged = pymerge.merge_tensors(base, [base.clone()] * 3, method)
    assert merged.dtype == base.dtype
    torch.testing.assert_close(merged, base, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_conv1d_is_the_transpose(method):
    """GPT-2's Conv1D stores d_in x d_out: in_axis=0 on the transpose is in_axis=1 on the weight, bit for bit."""
    base, experts = make_weights(24, 40, 3, dtype=torch.bfloat16)
    plain = pymerge.merge_tensors(base, experts, method)
    stored = [tensor.mT.contiguous() for tensor in [base, *experts]]
    transposed = pymerge.merge_tensors(stored[0], stored[1:], method, in_axis=0)
    torch.testing.assert_close(transposed.mT, plain, rtol=0, atol=0)
    wrong = pymerge.merge_tensors(stored[0], stored[1:], method, in_axis=1)
    assert not torch.equal(wrong.mT, plain)


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_a_stack_is_a_batch_of_linears(method):
    pairs = [make_weights(16, 24, 3, seed=seed) for seed in range(4)]
    base = torch.stack([base for base, _ in pairs])
    experts = [torch.stack([experts[t] for _, experts in pairs]) for t in range(3)]
    merged = pymerge.merge_tensors(base, experts, method)
    one_by_one = torch.stack([pymerge.merge_tensors(base, experts, method) for base, experts in pairs])
    torch.testing.assert_close(merged, one_by_one, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_strided_inputs(method):
    base, experts = make_weights(24, 40, 3)
    views = [torch.stack([tensor, tensor * 7], dim=-1)[..., 0] for tensor in [base, *experts]]
    assert not views[0].is_contiguous()
    merged = pymerge.merge_tensors(views[0], views[1:], method)
    torch.testing.assert_close(merged, pymerge.merge_tensors(base, experts, method), rtol=0, atol=0)


def test_state_dicts_treat_each_tensor_as_what_it_is():
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.attn.c_attn.bias": (24,),
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["position_ids"] = torch.arange(4)
    experts = [
        {
            k: v + 1e-3 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
            for k, v in base.items()
        }
        for _ in range(3)
    ]
    merged = pymerge.merge_state_dicts(base, experts, "wudi")
    assert list(merged) == list(base)
    torch.testing.assert_close(merged["position_ids"], base["position_ids"], rtol=0, atol=0)
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "h.0.attn.c_attn.bias"):
        mean = sum(expert[name].double() for expert in experts) / 3
        torch.testing.assert_close(merged[name].double(), mean, rtol=1e-6, atol=1e-7)
    for name, in_axis in [("model.layers.0.mlp.up_proj.weight", 1), ("h.0.attn.c_attn.weight", 0)]:
        one = pymerge.merge_tensors(base[name], [expert[name] for expert in experts], "wudi", in_axis=in_axis)
        torch.testing.assert_close(merged[name], one, rtol=0, atol=0)


def test_rest_and_exclude():
    base, experts = make_weights(16, 12, 3)
    name = "model.layers.0.mlp.up_proj.weight"
    dicts = [{name: expert} for expert in experts]
    kept = pymerge.merge_state_dicts({name: base}, dicts, "wudi", exclude=["up_proj"], rest="base")
    torch.testing.assert_close(kept[name], base, rtol=0, atol=0)
    mean = pymerge.merge_state_dicts({name: base}, dicts, "wudi", exclude=["up_proj"])
    torch.testing.assert_close(mean[name], sum(experts) / 3, rtol=1e-6, atol=1e-8)


def test_mistakes_are_named():
    base, experts = make_weights(6, 5, 2)
    with pytest.raises(ConfigError, match="did you mean 'wudi'"):
        pymerge.merge_tensors(base, experts, "wudy")
    with pytest.raises(ArgumentError, match="did you mean 'iterations'"):
        pymerge.merge_tensors(base, experts, "wudi", iteration=3)
    with pytest.raises(ArgumentError, match="at least 0"):
        pymerge.merge_tensors(base, experts, "wudi", iterations=-1)
    with pytest.raises(ArgumentError, match="3 values for 2 experts"):
        pymerge.merge_tensors(base, experts, "linear", weight=[1, 2, 3])
    with pytest.raises(ArgumentError, match=r"expert 1 has shape \(5, 6\), the base \(6, 5\)"):
        pymerge.merge_tensors(base, [experts[0], experts[1].mT], "wudi")
    with pytest.raises(ArgumentError, match="no experts"):
        pymerge.merge_tensors(base, [], "wudi")
    with pytest.raises(ArgumentError, match="add up to 0"):
        pymerge.merge_tensors(base, experts, "linear", weight=[1, -1])
    broken = experts[1].clone()
    broken[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="expert 1"):
        pymerge.merge_tensors(base, [experts[0], broken], "ace")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.up\.weight"):
        pymerge.merge_state_dicts({"layers.0.up.weight": base}, [{"layers.0.up.weight": broken}])


def test_the_table_has_every_method_of_every_module() -> None:
    modules = (import_module(f"pymerge.methods.{module.name}") for module in iter_modules(pymerge.methods.__path__))
    found = [method.name for module in modules for method in getattr(module, "METHODS", ())]
    assert sorted(found) == sorted(METHODS)
    assert len(METHODS) == len(set(found)) > 20
    for name, method in METHODS.items():
        assert method.name == name
        assert METHODS[name] is method
