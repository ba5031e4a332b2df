"""Masks and other small tensors that all models have alike: they come out as they went in, whatever the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge import api
from pymerge.errors import NonFiniteError
from pymerge.output.verify import verify
from pymerge.planner.constants import _rounded, find_constants
from pymerge.planner.match import Section
from tests.helpers.checkpoints import Tensors, change, fine_tuned, load_output, write_config, write_model, write_models

UP = "transformer.h.0.mlp.up_proj.weight"
MASK, BIAS, MASKED = "attn_mask", "transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"
OWN = "future_mask"  # no name that is known
INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.3},
    "linear": {"weight": 0.3},
    "ties": {"weight": 1.0, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5},
    "sce": {"select_topk": 0.5},
    "model_stock": {},
    "karcher": {},
    "ram": {},
    "wudi_flow": {},
    "ace": {},
    "tsv_m": {},
}


def constants(dtype: torch.dtype = torch.float32) -> Tensors:
    return {
        MASK: torch.full((8, 8), -INF).triu(1).to(dtype),
        BIAS: torch.tril(torch.ones(1, 1, 8, 8)).to(dtype),
        MASKED: torch.tensor(-1e9).to(dtype),
        "transformer.h.0.attn.inv_freq": (1.0 / 10000 ** (torch.arange(0.0, 16, 2) / 16)).to(dtype),
        "transformer.h.0.attn.flags": torch.ones(8, 8).tril().bool(),
        "final_logits_bias": torch.tensor([[0.0, -INF, INF]]).to(dtype),
        "suppressed_bias": torch.tensor([-INF, 0.0]).to(dtype),
    }


def write(folder: Path, held: Tensors, dtype: torch.dtype = torch.float32) -> Path:
    """A base and two experts with weights of their own, and the same `held`."""
    weights = {UP: torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(dtype)}
    write_model(folder / "base", weights | held)
    for number in range(2):
        write_model(folder / f"e{number}", fine_tuned(weights, number, 0.1) | held)
    return folder


def merged(folder: Path, method: str = "task_arithmetic", more: str = "", **options: Any) -> Tensors:
    config = write_config(folder, method, more=more, **METHODS[method])
    api.merge(config, folder / "out", progress=False, overwrite=True, **options)
    assert verify(folder / "out").problems == []
    return load_output(folder / "out")


def same(found: Tensors, held: Tensors) -> bool:
    return all(found[name].dtype == held[name].dtype and torch.equal(found[name], held[name]) for name in held)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_come_out_as_they_went_in(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    held = constants(dtype)
    write(tmp_path, held, dtype)
    for more in ("", "allow_nonfinite: true"):
        found = merged(tmp_path, method, more)
        assert same(found, held)
        assert torch.isfinite(found[UP]).all()
        assert not torch.equal(found[UP], load_output(tmp_path / "base")[UP])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_on_every_backend(tmp_path: Path, backend: str) -> None:
    held = constants()
    write(tmp_path, held)
    assert same(merged(tmp_path, "ties", backend=backend), held)
    found = merged(tmp_path, "ties", "dtype: bfloat16", backend=backend)
    assert same(found, {name: held[name].bfloat16() for name in (MASK, BIAS, "final_logits_bias")})


@pytest.mark.parametrize(
    ("value", "wanted", "kept"),
    [
        (-1e9, torch.float16, torch.float32),
        (-65504.0, torch.float16, torch.float16),
        (LOWEST, torch.bfloat16, torch.float32),  # rounds to -inf there
        (torch.finfo(torch.bfloat16).min, torch.bfloat16, torch.bfloat16),
        (-INF, torch.float16, torch.float16),
    ],
)
def test_what_the_outputs_dtype_cannot_hold_keeps_its_own(
    tmp_path: Path, value: float, wanted: torch.dtype, kept: torch.dtype
) -> None:
    write(tmp_path, {MASKED: torch.full((1, 1, 4, 4), value)})
    name = str(wanted).removeprefix("torch.")
    found = merged(tmp_path, more=f"dtype: {name}")
    assert found[UP].dtype == wanted
    assert found[MASKED].dtype == kept
    assert found[MASKED].unique().tolist() == [value]
    warnings = api.plan(tmp_path / "merge.yml").warnings
    said = f"1 tensor: {MASKED}: constants with values that {name} cannot hold; written as in"
    assert [warning.startswith(said) for warning in warnings] == ([True] if kept != wanted else [])


def test_sums_that_would_overflow(tmp_path: Path) -> None:
    write(tmp_path, {MASK: torch.full((4, 4), LOWEST), MASKED: torch.tensor(65504.0, dtype=torch.float16)})
    config = write_config(tmp_path, "linear", weight=3.0)
    api.merge(config, tmp_path / "out", progress=False)
    found = load_output(tmp_path / "out")
    assert found[MASK].unique().tolist() == [LOWEST]
    assert found[MASKED].item() == 65504.0


def test_weights_that_do_not_add_up_to_1_scale_what_is_finite(tmp_path: Path) -> None:
    """A sum of halves of all models is half of each, of a scalar that may be a weight, too; infinity stays."""
    write(tmp_path, {"logit_scale": torch.tensor(8.0), MASK: torch.full((2, 2), -INF)})
    config = write_config(tmp_path, "linear", weight=0.25, normalize=False)
    api.merge(config, tmp_path / "out", progress=False)
    found = load_output(tmp_path / "out")
    assert found["logit_scale"].item() == 4.0
    assert (found[MASK] == -INF).all()


def test_models_in_other_dtypes_and_files_of_pytorch(tmp_path: Path) -> None:
    held = constants()
    write(tmp_path, held)
    narrow = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in held.items()}
    change(tmp_path / "e0", lambda tensors: tensors.update(narrow))
    tensors = load_output(tmp_path / "e1")
    tensors[MASK] = tensors[MASK].T.contiguous().T  # strides of its own
    (tmp_path / "e1/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "e1/pytorch_model.bin")
    assert same(merged(tmp_path, "ties"), held)


@pytest.mark.parametrize("change_one", [lambda mask: mask[0, 0].fill_(1.0), lambda mask: mask[7, 0].fill_(INF)])
def test_what_differs_is_merged_or_refused_if_no_name_says_what_it_is(tmp_path: Path, change_one: Any) -> None:
    write(tmp_path, {OWN: torch.full((8, 8), -INF).triu(1)})
    change(tmp_path / "e1", lambda tensors: change_one(tensors[OWN]))
    with pytest.raises(NonFiniteError, match=r"base/model\.safetensors: tensor 'future_mask' has 28 values"):
        merged(tmp_path)
    change(tmp_path / "base", lambda tensors: tensors.update({OWN: torch.zeros(8, 8)}))
    change(tmp_path / "e0", lambda tensors: tensors.update({OWN: torch.ones(8, 8)}))
    change(tmp_path / "e1", lambda tensors: tensors.update({OWN: torch.full((8, 8), 3.0)}))
    torch.testing.assert_close(merged(tmp_path)[OWN], torch.full((8, 8), 0.3 + 0.9))


def test_nan_is_no_constant(tmp_path: Path) -> None:
    write(tmp_path, {MASKED: torch.tensor(float("nan"))})
    with pytest.raises(NonFiniteError, match="masked_bias"):
        merged(tmp_path)


def test_a_damaged_mask_is_found(tmp_path: Path) -> None:
    write(tmp_path, constants())
    merged(tmp_path)
    manifest = json.loads((tmp_path / "out/pymerge_manifest.json").read_text())
    tensors = manifest["shards"]["model.safetensors"]["tensors"]
    assert {name: each["infinite"] for name, each in tensors.items() if "infinite" in each} == {
        MASK: 28,
        "final_logits_bias": 2,
        "suppressed_bias": 1,
    }
    tensors[MASK]["infinite"] = 27
    (tmp_path / "out/pymerge_manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(tmp_path / "out").problems
    assert "tensor 'attn_mask' has 28 values that are NaN or infinite" in problem


def test_stages_and_slices(tmp_path: Path) -> None:
    held = constants()
    write(tmp_path, held)
    text = (
        "name: one\nmerge_method: ties\nbase_model: base\nmodels:\n- {model: e0, parameters: {weight: 1}}\n"
        "---\nmerge_method: ties\nbase_model: base\nmodels:\n- {model: one, parameters: {weight: 1}}\n"
        "- {model: e1, parameters: {weight: 1}}\ndtype: float16\n"
    )
    (tmp_path / "multi.yml").write_text(text)
    api.multi(tmp_path / "multi.yml", tmp_path / "out", progress=False)
    found = load_output(tmp_path / "out")
    assert same(found, {MASK: held[MASK].half(), BIAS: held[BIAS].half(), MASKED: held[MASKED]})
    sliced = "merge_method: linear\nslices:\n- sources:\n"
    sliced += "".join(
        f"  - {{model: {name}, layer_range: [0, 1], parameters: {{weight: 0.4}}}}\n" for name in ("e0", "e1")
    )
    (tmp_path / "slices.yml").write_text(sliced)
    api.merge(tmp_path / "slices.yml", tmp_path / "sliced", progress=False)
    assert same(load_output(tmp_path / "sliced"), held)


def test_layers_that_only_the_base_gives(tmp_path: Path) -> None:
    """They are copied, masks with infinities among them."""
    mask = torch.full((8, 8), -INF).triu(1)
    tensors: Tensors = {}
    for block in range(2):
        tensors[f"model.layers.{block}.mlp.up_proj.weight"] = torch.randn(8, 8)
        tensors[f"model.layers.{block}.self_attn.mask"] = mask.clone()
    write_model(tmp_path / "base", tensors, config={"num_hidden_layers": 2})
    tuned = fine_tuned(tensors, 0) | {name: mask.clone() for name in tensors if name.endswith("mask")}
    write_model(tmp_path / "e0", tuned, config={"num_hidden_layers": 2})
    text = "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1}\nslices:\n"
    for block, models in enumerate((["base"], ["base", "e0"])):
        sources = "".join(f"  - {{model: {name}, layer_range: [{block}, {block + 1}]}}\n" for name in models)
        text += f"- sources:\n{sources}"
    (tmp_path / "merge.yml").write_text(text)
    api.merge(tmp_path / "merge.yml", tmp_path / "out", progress=False)
    assert verify(tmp_path / "out").problems == []
    found = load_output(tmp_path / "out")
    assert all(torch.equal(found[name], mask) for name in tensors if name.endswith("mask"))


def test_in_memory_it_is_the_same() -> None:
    held = {name: tensor for name, tensor in constants().items() if tensor.is_floating_point()}
    base: dict[str, Tensor] = {UP: torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    experts = [fine_tuned(base, number, 0.1) | held for number in range(2)]
    for method in ("ties", "linear", "wudi_flow", "slerp"):
        used = experts[:1] if method == "slerp" else experts
        parameters = {"t": 0.5} if method == "slerp" else {} if method == "wudi_flow" else {"weight": 0.3}
        assert same(pymerge.merge_state_dicts(base | held, used, method, **parameters), held)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[-1.0, 0.5], [1.0, 0.5], [-0.0, 0.0], [-3.0, INF, 2.0], [-INF] * 3, [INF, 4.0]])
def test_what_is_known_of_values(tmp_path: Path, values: list[float], dtype: torch.dtype) -> None:
    """Where all are known: the largest finite magnitude, and how many infinities, in tensors of several reads."""
    for name, padding in (("small", 0), ("large", 2**18)):
        whole = torch.tensor([0.0] * padding + values).to(dtype)
        write(tmp_path / name, {MASK: whole})
        plan = api.plan(write_config(tmp_path / name, "ties", weight=1.0))
        inputs = plan.inputs
        roles = {step.name: step.role for step in plan.steps}
        section = Section(plan.config, (0, 1), inputs.experts, {})
        found = find_constants(inputs, [MASK], roles, {MASK: section})[MASK]
        finite = whole[whole.isfinite()].abs()
        assert found.largest == (finite.max().item() if finite.numel() else 0.0)
        assert found.infinite == int(whole.isinf().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_that_of_pytorch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(
        -9, 39, (2000,), generator=generator
    )
    values = torch.cat([values, torch.tensor([0.0, INF, -INF, 65519.9, 65520.0, LOWEST, 3.3961775e38, 1e-45])])
    code = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    expected = values.float().to(dtype) if dtype == torch.bfloat16 else values.to(dtype)
    assert [_rounded(value, code) for value in values.tolist()] == expected.double().tolist()


def test_models_as_they_are_read_nothing_of_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning an ordinary merge goes by headers alone."""
    base = {
        UP: torch.randn(24, 16),
        "transformer.h.0.ln.weight": torch.ones(16),
        "transformer.h.0.ln.bias": torch.ones(16),
    }
    write_models(tmp_path, base)
    monkeypatch.setattr("pymerge.checkpoint.reader.Reader.read_bytes", None)
    assert len(api.plan(write_config(tmp_path, "task_arithmetic")).steps) == 3


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties"])
@pytest.mark.parametrize("name", ["transformer.h.0.attn.inv_freq", MASK])
def test_one_known_by_its_name_is_the_bases_where_models_differ(tmp_path: Path, method: str, name: str) -> None:
    held = constants()
    write(tmp_path, held)
    other = held[name].clamp(min=-1e9) / 2 - 1
    write_model(tmp_path / "e1", load_output(tmp_path / "e1") | {name: other})
    assert same(merged(tmp_path, method), held)
    warnings = api.plan(tmp_path / "merge.yml").warnings
    text = f"1 tensor: {name}: constants with other values in other models, of which no merge is one; those of"
    assert [each for each in warnings if each.startswith(text)]
