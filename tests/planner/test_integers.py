"""Integers are copied: the same in all models, or a refusal that says which; never weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pymerge import api
from pymerge.errors import PlanError
from pymerge.planner.integers import integer_weights
from pymerge.planner.plan import Plan
from tests.helpers.checkpoints import Tensors, fine_tuned, load_output, write_config, write_model, write_models

POSITIONS = torch.arange(8).reshape(1, 8)
CAUSAL = torch.ones(1, 1, 4, 4).tril()
BASE: Tensors = {"layers.0.up.weight": torch.eye(4), "norm.weight": torch.ones(4)}
BUFFERS: Tensors = {
    "embeddings.position_ids": POSITIONS,
    "layers.0.attn.bias": CAUSAL.bool(),
    "layers.1.attn.bias": CAUSAL.to(torch.uint8),
    "layers.0.attn.relative_position_index": torch.arange(16).reshape(4, 4) % 5,
    "token_to_id": torch.tensor([[3, 1], [2, 0]], dtype=torch.int32),
    "bn.num_batches_tracked": torch.tensor(7),
}


def planned(folder: Path, changed: Tensors, *, method: str = "task_arithmetic", more: str = "") -> Plan:
    """The plan of two experts, the second of which has other buffers."""
    base = BASE | BUFFERS
    write_models(folder, base)
    write_model(folder / "e1", fine_tuned(base, 1) | changed)
    parameters = {} if method == "wudi" else {"weight": 0.5}
    return api.plan(write_config(folder, method, more=more, **parameters))


def refused(folder: Path, changed: Tensors, more: str = "") -> str:
    with pytest.raises(PlanError) as caught:
        planned(folder, changed, more=more)
    (problem,) = caught.value.problems
    assert str(folder / "e1") in problem
    return problem


@pytest.mark.parametrize("method", ["linear", "ties", "wudi"])
def test_equal_integers_pass_without_a_word_and_are_copied(method: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, {"bn.num_batches_tracked": torch.tensor(90)}, method=method)
    assert plan.warnings == ()
    api.merge(tmp_path / "merge.yml", tmp_path / "out", device="cpu", progress=False)
    found = load_output(tmp_path / "out")
    for name, tensor in BUFFERS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "name", ["token_to_id", "embeddings.position_ids", "layers.0.attn.relative_position_index", "layers.0.attn.bias"]
)
def test_other_values_are_refused(name: str, tmp_path: Path) -> None:
    changed = BUFFERS[name].clone().flip(-1)
    problem = refused(tmp_path, {name: changed})
    assert f"1 tensor: {name}: integers with other values" in problem
    assert "quantised" in problem
    assert f"pattern: '{name.replace('.', chr(92) + '.')}', kind: buffer" in problem


def test_the_last_of_many_values_counts(tmp_path: Path) -> None:
    changed = BUFFERS["token_to_id"].clone()
    changed[-1, -1] = 9
    assert "token_to_id" in refused(tmp_path, {"token_to_id": changed})


def test_a_rule_takes_the_base_s(tmp_path: Path) -> None:
    more = "layers:\n  - {pattern: 'token_to_id', kind: buffer}\n"
    plan = planned(tmp_path, {"token_to_id": BUFFERS["token_to_id"].flip(0)}, more=more)
    assert plan.warnings == ()
    api.merge(tmp_path / "merge.yml", tmp_path / "out", device="cpu", progress=False)
    assert torch.equal(load_output(tmp_path / "out")["token_to_id"], BUFFERS["token_to_id"])


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("embeddings.position_ids", POSITIONS.to(torch.int32)),
        ("layers.0.attn.bias", CAUSAL),
        ("layers.0.attn.bias", CAUSAL.bfloat16()),
        ("layers.1.attn.bias", CAUSAL.bool()),
    ],
)
def test_the_same_numbers_of_another_dtype_are_the_same(name: str, changed: torch.Tensor, tmp_path: Path) -> None:
    assert planned(tmp_path, {name: changed}).warnings == ()


@pytest.mark.parametrize(
    ("name", "changed"),
    [("layers.0.attn.bias", 2 * CAUSAL), ("embeddings.position_ids", POSITIONS.to(torch.int16) + 1)],
)
def test_other_numbers_of_another_dtype_are_others(name: str, changed: torch.Tensor, tmp_path: Path) -> None:
    assert name in refused(tmp_path, {name: changed})


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("embeddings.position_ids", torch.arange(12).reshape(1, 12)),
        ("embeddings.position_ids", torch.arange(5).reshape(1, 5)),
        ("layers.0.attn.bias", torch.ones(1, 1, 9, 9).tril().bool()),
    ],
)
def test_lists_of_another_length_that_agree_are_the_base_s_with_a_warning(
    name: str, changed: torch.Tensor, tmp_path: Path
) -> None:
    (warning,) = planned(tmp_path, {name: changed}).warnings
    assert f"{tmp_path / 'e1'}: 1 tensor: {name}: another length" in warning
    assert f"than in {tmp_path / 'base'}, whose integers are kept" in warning


def test_a_single_number_that_differs_is_the_base_s_with_a_warning(tmp_path: Path) -> None:
    write_models(tmp_path, BASE | {"version": torch.tensor([3])}, experts=1)
    write_model(tmp_path / "e0", BASE | {"version": torch.tensor([4])})
    (warning,) = api.plan(write_config(tmp_path, "linear", experts=1)).warnings
    assert "1 tensor: version: another value than in" in warning


def test_an_expert_without_them_is_fine(tmp_path: Path) -> None:
    write_models(tmp_path, BASE | BUFFERS, experts=1)
    write_model(tmp_path / "e0", fine_tuned(BASE, 1))
    assert api.plan(write_config(tmp_path, "linear", experts=1)).warnings == ()


def test_integers_where_weights_should_be(tmp_path: Path) -> None:
    """Codes without a scale beside them, the same in all models: their role says what they are."""
    codes = {"layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 6, dtype=torch.int8)}
    write_models(tmp_path, BASE | codes)
    with pytest.raises(
        PlanError, match=r"integers \(I8\) where weights should be.*quantised.*kind: buffer\}"
    ) as caught:
        api.plan(write_config(tmp_path, "linear"))
    assert "layers.0.mlp.experts.gate_up_proj" in str(caught.value)
    more = "layers:\n  - {pattern: 'experts', kind: buffer}\n"
    assert api.plan(write_config(tmp_path, "linear", more=more)).warnings == ()


def test_integers_in_an_expert_where_the_base_has_numbers(tmp_path: Path) -> None:
    write_models(tmp_path, BASE | {"layers.0.gate": torch.ones(4, 4)}, experts=1)
    write_model(tmp_path / "e0", BASE | {"layers.0.gate": torch.full((4, 4), 2, dtype=torch.int32)})
    with pytest.raises(PlanError, match="has dtype I32, and integers cannot be merged with numbers; if they are codes"):
        api.plan(write_config(tmp_path, "linear", experts=1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_a_mask_that_the_base_has_as_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    base = BASE | {"layers.0.attn.window": CAUSAL}
    write_models(tmp_path, base)
    tuned = fine_tuned(BASE, 3)
    write_model(tmp_path / "e0", tuned | {"layers.0.attn.window": CAUSAL.to(dtype)})
    write_model(tmp_path / "e1", tuned | {"layers.0.attn.window": CAUSAL})
    assert api.plan(write_config(tmp_path, "task_arithmetic")).warnings == ()
    api.merge(tmp_path / "merge.yml", tmp_path / "out", device="cpu", progress=False)
    found = load_output(tmp_path / "out")
    assert torch.equal(found["layers.0.attn.window"], CAUSAL)
    torch.testing.assert_close(found["norm.weight"], tuned["norm.weight"])
    write_model(tmp_path / "e0", tuned | {"layers.0.attn.window": (1 - CAUSAL).to(dtype)})
    with pytest.raises(PlanError, match=r"layers\.0\.attn\.window.*integers cannot be merged with numbers"):
        api.plan(tmp_path / "merge.yml")


def test_tables_and_masks_are_no_weights_by_role() -> None:
    shapes = {name: ("I64", tuple(tensor.shape)) for name, tensor in BUFFERS.items()}
    assert integer_weights(shapes, {}) == []
    assert integer_weights({"a.w": ("I8", (4, 8)), "a.w_bias": ("F32", (4,))}, {}) == ["a.w"]


def test_integers_of_a_model_that_has_yet_to_be_written(tmp_path: Path) -> None:
    """In a chain of merges they are those of the model that they will be copied from."""
    base = BASE | BUFFERS
    write_models(tmp_path, base)
    other = {"token_to_id": BUFFERS["token_to_id"].flip(0)}
    write_model(tmp_path / "e1", fine_tuned(base, 1) | other)
    chain = tmp_path / "chain.yml"
    chain.write_text(
        "name: first\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: e0}, {model: base}]\n---\n"
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: first}, {model: e1}]\n"
    )
    with pytest.raises(PlanError, match=r"token_to_id: integers with other values"):
        api.multi(chain, tmp_path / "out", intermediate_dir=tmp_path / "between", device="cpu", progress=False)
    assert not (tmp_path / "between" / "first").exists()
    write_model(tmp_path / "e1", fine_tuned(base, 1))
    api.multi(chain, tmp_path / "out", intermediate_dir=tmp_path / "between", device="cpu", progress=False)
    assert torch.equal(load_output(tmp_path / "out")["token_to_id"], BUFFERS["token_to_id"])
