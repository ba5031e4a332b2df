"""pymerge's methods in mergekit's registry; run by tests/integrations/test_mergekit.py, with mergekit installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mergekit.merge
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get, merge_state_dicts, merge_tensors, registered_methods
from mergekit.options import MergeOptions
from torch import Tensor

import pymerge
from pymerge.errors import ArgumentError
from pymerge.integrations.mergekit import register_methods
from pymerge.methods import METHODS
from tests.helpers.checkpoints import fine_tuned, llama, llama_config, load_output, write_models

NAMES = {method.spec.name for method in registered_methods()}
NEW = register_methods()
# What is fast enough, and can be computed of one tensor.
PARAMETERS: dict[str, dict[str, Any]] = {
    "wudi": {"iterations": 5},
    "knots": {"density": 0.5},
    "doge": {"iterations": 5, "scope": "tensor"},
}


def test_what_mergekit_does_not_have_is_registered() -> None:
    assert set(NEW) == {name for name in METHODS.keys() - NAMES if not METHODS[name].needs_inputs}
    assert set(NEW) >= {"wudi", "wudi_flow", "swudi", "swudi_a", "ace", "tsv_m", "iso_c", "iso_cts"}
    assert register_methods() == []
    assert {method.spec.name for method in registered_methods()} == NAMES | set(NEW)


@pytest.mark.parametrize("method", NEW)
def test_merges_in_memory_are_pymerges(method: str) -> None:
    base = llama()
    experts = [fine_tuned(base, seed) for seed in range(2)]
    parameters = PARAMETERS.get(method, {})
    theirs = merge_state_dicts([*experts, base], method, base=2, parameters=parameters)
    ours = pymerge.merge_state_dicts(base, experts, method, **parameters)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert theirs.keys() == ours.keys()

    name = "model.layers.0.mlp.up_proj.weight"
    one = merge_tensors([base[name], *(e[name] for e in experts)], method, base_index=0, parameters=parameters)
    whole = pymerge.merge_tensors(base[name], [e[name] for e in experts], method, **parameters)
    if method != "knots":  # whose random numbers follow names
        assert torch.equal(one, whole)


def test_what_needs_the_whole_model_is_refused() -> None:
    """It is doge's default; mergekit gives each tensor alone."""
    base = llama()
    experts = [fine_tuned(base, seed) for seed in range(2)]
    with pytest.raises(ArgumentError, match=r"scope: model of 'doge' needs .* give scope: tensor, or"):
        merge_state_dicts([*experts, base], "doge", base=2)


def merged(folder: Path, document: dict[str, Any]) -> dict[str, Tensor]:
    """The output of mergekit's own engine."""
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    mergekit.merge.run_merge(MergeConfiguration.model_validate(document), str(folder / "out"), options)
    return load_output(folder / "out")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["wudi_flow", "ace", "iso_c"])
def test_merges_of_files_by_mergekits_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, tied: bool
) -> None:
    base = llama(tied=tied)
    write_models(tmp_path, base, config=llama_config(base, tied=tied))
    monkeypatch.chdir(tmp_path)
    document = {
        "merge_method": method,
        "base_model": "./base",
        "models": [{"model": "./e0"}, {"model": "./e1"}],
        "parameters": {"scale": [{"filter": "q_proj", "value": 0.0}, {"value": 1.0}]},
    }
    theirs = merged(tmp_path, document)
    assert torch.equal(theirs["model.layers.1.self_attn.q_proj.weight"], base["model.layers.1.self_attn.q_proj.weight"])
    pymerge.merge(document, tmp_path / "ours", device="cpu", progress=False)
    ours = load_output(tmp_path / "ours")
    assert theirs.keys() - ours.keys() == ({"lm_head.weight"} if tied else set())  # where mergekit repeats the table
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_parameters_are_checked_and_read() -> None:
    spec = get("wudi").spec
    lr = next(parameter for parameter in spec.parameters if parameter.name == "lr")
    assert lr.validate("auto") == "auto"
    base, experts = torch.randn(6, 4), [torch.randn(6, 4) for _ in range(2)]

    def solve(**parameters: Any) -> Tensor:
        parameters = {"iterations": 3, **parameters}
        return merge_tensors([base, *experts], "wudi", base_index=0, name="a.weight", parameters=parameters)

    assert torch.equal(solve(lr="1e-4"), solve(lr=1e-4))
    assert not torch.equal(solve(lr=1e-4), solve(lr=1e-3))
    with pytest.raises(ArgumentError, match="parameter 'lr' is 'fast'; it must be"):
        solve(lr="fast")
    with pytest.raises(TypeError, match="Unknown parameter"):
        solve(rate=1)
    with pytest.raises(ValueError, match="requires a base"):
        merge_tensors(experts, "wudi")


def test_embeddings_are_not_solved_whatever_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit.merge_methods import TensorGroup

    base, experts = torch.randn(6, 4), [torch.randn(6, 4) for _ in range(2)]
    group = TensorGroup.from_tensors([base, *experts], base_index=0, name="x.y.weight", vocabulary_axis=0)
    (result,) = get("wudi_flow")((group,))
    rest = pymerge.merge_state_dicts(
        {"embed_tokens.weight": base}, [{"embed_tokens.weight": expert} for expert in experts], "wudi_flow"
    )
    assert torch.equal(result, rest["embed_tokens.weight"])


def test_what_one_tensor_does_not_tell_is_asked_for() -> None:
    base, experts = torch.randn(6, 6), [torch.randn(6, 6) for _ in range(2)]

    def solve(name: str, tensors: list[Tensor], **parameters: Any) -> Tensor:
        return merge_tensors(tensors, "wudi_flow", base_index=0, name=name, parameters=parameters)

    name = "transformer.h.0.attn.c_proj.weight"
    with pytest.raises(ArgumentError, match="add in_axis: 0 or in_axis: 1"):
        solve(name, [base, *experts])
    columns = solve(name, [base, *experts], in_axis=0)
    turned = pymerge.merge_tensors(base.T.contiguous(), [expert.T.contiguous() for expert in experts], "wudi_flow")
    assert torch.allclose(columns, turned.T, atol=1e-5)
    assert not torch.allclose(columns, solve(name, [base, *experts], in_axis=1), atol=1e-3)
    stack = [torch.randn(2, 6, 6) for _ in range(3)]
    with pytest.raises(ArgumentError, match=r"stack of experts.*replace_engine"):
        solve("model.layers.0.mlp.experts.gate_up_proj", stack)


def test_those_that_mergekit_has_by_another_name() -> None:
    names = register_methods(prefixed=True)
    assert set(names) == {f"pymerge_{name}" for name in METHODS.keys() & NAMES}
    assert register_methods(prefixed=True) == []
    base = llama()
    experts = [fine_tuned(base, seed) for seed in range(2)]
    cases = {
        "ties": {"weight": [0.3, 0.6], "density": 0.5},
        "dare_ties": {"weight": 0.5, "density": 0.5, "random_seed": 3},
        "task_arithmetic": {"weight": 0.5, "lambda": 0.7},
    }
    for method, parameters in cases.items():
        theirs = merge_state_dicts([base, *experts], f"pymerge_{method}", base=0, parameters=parameters)
        ours = pymerge.merge_state_dicts(base, experts, method, **parameters)
        assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    linear = merge_tensors([torch.ones(3), torch.zeros(3)], "pymerge_linear", parameters={"weight": [1.0, 3.0]})
    assert torch.equal(linear, torch.full((3,), 0.25))
    if any(parameter.name == "scope" for parameter in METHODS["ties"].parameters):
        with pytest.raises(ArgumentError, match="scope: model of 'ties' needs the whole model"):
            merge_state_dicts([base, *experts], "pymerge_ties", base=0, parameters={"weight": 1.0, "scope": "model"})
