"""Adapters merged and extracted, beside what mergekit makes of them; run by tests/integrations/test_mergekit.py."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mergekit.merge
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from torch import Tensor

import pymerge
from tests.adapters.test_peft import peft, trained
from tests.extraction.test_peft import anything, llama, saved
from tests.helpers.checkpoints import load_output

SIZES = {"hidden_size": 48, "intermediate_size": 64}
MODULES = ("q_proj", "v_proj", "down_proj")
WEIGHTS = (0.75, 0.5)
DENSITY = 0.6


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A Llama, and two adapters of other ranks and scales on some of the same modules."""
    llama(**SIZES).save_pretrained(tmp_path / "base")
    kinds = ({"r": 4, "lora_alpha": 8}, {"r": 3, "lora_alpha": 6, "use_rslora": True})
    for number, (kind, modules) in enumerate(zip(kinds, (MODULES, MODULES[1:]), strict=True)):
        model = trained(llama(**SIZES), peft.LoraConfig(**kind, target_modules=[*modules]))
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.data = (1 + number) * parameter.data.roll(number)
        model.save_pretrained(tmp_path / f"a{number}")
    return tmp_path


def documents(models: Path, method: str, **parameters: Any) -> dict[str, Any]:
    """A config that both read. mergekit's linear refuses a base."""
    adapters = [
        {"model": f"{models / 'base'}+{models / f'a{number}'}", "parameters": {"weight": weight}}
        for number, weight in enumerate(WEIGHTS)
    ]
    based = {} if method == "linear" else {"base_model": str(models / "base")}
    return {"merge_method": method, "models": adapters, "parameters": parameters, "dtype": "float32", **based}


def both(models: Path, method: str, **parameters: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of mergekit, which writes a copy of the model for each adapter first, and of pymerge."""
    document = documents(models, method, **parameters)
    options = MergeOptions(quiet=True, copy_tokenizer=False, lora_merge_cache=str(models / "cache"))
    mergekit.merge.run_merge(MergeConfiguration.model_validate(document), str(models / "theirs"), options)
    pymerge.merge(document, models / "ours", device="cpu", progress=False)
    assert len([*(models / "cache").iterdir()]) == len(WEIGHTS)
    theirs, ours = load_output(models / "theirs"), load_output(models / "ours")
    assert theirs.keys() == ours.keys()
    return theirs, ours


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("linear", {"normalize": False}),
        ("task_arithmetic", {}),
        ("ties", {"density": DENSITY}),
        ("ties", {"density": 1.0, "normalize": False}),
    ],
)
def test_merges_of_adapters_are_mergekits(models: Path, method: str, parameters: dict[str, Any]) -> None:
    theirs, ours = both(models, method, **parameters)
    base = load_output(models / "base")
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-6), name
        assert torch.equal(tensor, base[name]) is not any(module in name for module in MODULES) or method == "linear"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_merges_of_adapters_have_mergekits_values_and_shares(models: Path, method: str) -> None:
    """Each element of both is one of the four sums of what is kept, about as often as the density says."""
    theirs, ours = both(models, method, density=DENSITY, normalize=False, rescale=False)
    base = load_output(models / "base")
    wholes = [_applied(models, number) for number in range(len(WEIGHTS))]
    kept = [*itertools.product((False, True), repeat=len(WEIGHTS))]
    for found in (theirs, ours):
        counts, size = torch.zeros(len(kept)), 0
        for name in (name for name in base if any(module in name for module in MODULES[1:])):
            taus = [whole[name].double() - base[name].double() for whole in wholes]
            candidates = torch.stack([_sum_of(taus, each, elected=method == "dare_ties") for each in kept])
            distances = (found[name].double() - base[name].double() - candidates).abs()
            assert distances.amin(dim=0).max() < 1e-6, name
            # Where adapters disagree TIES leaves one of them out, and two sums may be the same.
            told = torch.ones_like(taus[0], dtype=torch.bool) if method == "dare_linear" else taus[0] * taus[1] > 0
            counts += torch.bincount(distances.argmin(dim=0)[told], minlength=len(kept))
            size += int(told.sum())
        for count, each in zip(counts.tolist(), kept, strict=True):
            chance = torch.tensor([DENSITY if keep else 1 - DENSITY for keep in each]).prod().item()
            assert abs(count - size * chance) < 5 * (size * chance * (1 - chance)) ** 0.5
    assert any(not torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def _applied(models: Path, number: int) -> dict[str, Tensor]:
    """The base with one adapter, as PEFT merges it."""
    model: Any = peft.PeftModel.from_pretrained(llama(**SIZES), models / f"a{number}")
    return dict(model.merge_and_unload().state_dict())


def _sum_of(taus: list[Tensor], kept: tuple[bool, ...], *, elected: bool) -> Tensor:
    parts = torch.stack([weight * keep * tau for weight, keep, tau in zip(WEIGHTS, kept, taus, strict=True)])
    if elected:
        sign = torch.where(parts.sum(dim=0) >= 0, 1.0, -1.0)
        parts = parts * (parts.sign() == sign)
    return parts.sum(dim=0)


@pytest.mark.parametrize("more", [[], ["--no-distribute-scale"]])
def test_extracted_products_are_mergekits(tmp_path: Path, more: list[str]) -> None:
    """At a rank at which much is lost, and of as many modules."""
    base, tuned, _ = saved(lambda: llama(**SIZES), _of_full_rank, tmp_path)
    rank = 5
    code = "from mergekit.scripts.extract_lora import main; main()"
    sides = ["--model", str(tuned), "--base-model", str(base), "--out-path", str(tmp_path / "theirs")]
    linear = ["--max-rank", str(rank), "--skip-undecomposable", "--exclude-regex", "embed_tokens|lm_head", *more]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, *sides, *linear], check=True, env=env)
    pymerge.extract(base, tuned, tmp_path / "ours", rank=rank, progress=False)
    theirs, ours = (_products(tmp_path / out) for out in ("theirs", "ours"))
    assert len(ours) == 14
    assert ours.keys() == theirs.keys()
    for module, product in ours.items():
        assert (product - theirs[module]).norm() < 1e-5 * product.norm(), module


def _of_full_rank(name: str, weight: Tensor) -> Tensor:
    """A difference whose singular values fall by a third each, so that the leading ones are told apart."""
    if weight.ndim < 2:
        return anything(name, weight)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    left, _, right = torch.linalg.svd(torch.randn(weight.shape, generator=generator), full_matrices=False)
    return (left * (2 / 3) ** torch.arange(len(right))) @ right


def _products(folder: Path) -> dict[str, Tensor]:
    factors = load_file(folder / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = [key.removesuffix(ends[0]) for key in factors if key.endswith(ends[0])]
    assert len(factors) == 2 * len(modules)
    return {module: factors[module + ends[1]].double() @ factors[module + ends[0]].double() for module in modules}
