"""RegMean against the formula in float64, in memory and from files, with what is missing, wrong or changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.engine.recheck import recheck
from pymerge.errors import ArgumentError, CheckpointError, ConfigError, NonFiniteError, OutputError, PlanError
from pymerge.grams.collect import Settings, collect
from pymerge.planner.grams import HeldGram
from tests.helpers.collected import save_model, write_texts

Array = np.ndarray[Any, np.dtype[np.float64]]


def oracle(weights: list[Array], grams: list[Array], ratio: float = 1.0) -> Array:
    """W^T = (sum_t G_t)^-1 sum_t G_t W_t^T, from the paper."""
    reduced = [ratio * gram + (1 - ratio) * np.diag(np.diag(gram)) for gram in grams]
    right = sum(gram @ weight.T for gram, weight in zip(reduced, weights, strict=True))
    return np.linalg.solve(sum(reduced), right).T


def random_case(rows: int, columns: int, tasks: int = 3) -> tuple[list[Array], list[Array]]:
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=(rows, columns)) for _ in range(tasks + 1)]
    inputs = [generator.normal(size=(3 * columns + 2, columns)) for _ in range(tasks)]
    return weights, [x.T @ x / len(x) for x in inputs]


def tensors(arrays: list[Array]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(array)) for array in arrays]


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (9, 4), (1, 3), (4, 1)])
@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.0])
def test_in_memory_it_is_the_formula(rows: int, columns: int, ratio: float) -> None:
    (base, *experts), grams = random_case(rows, columns)
    merged = pymerge.merge_tensors(
        torch.from_numpy(base),
        tensors(experts),
        "regmean",
        grams=tensors(grams),
        reduce_non_diagonal_ratio=ratio,
        device="cpu",
    )
    np.testing.assert_allclose(merged.numpy(), oracle(experts, grams, ratio), rtol=1e-10, atol=1e-12)


def test_a_conv1d_has_the_gram_of_its_inputs() -> None:
    (base, *experts), grams = random_case(5, 7)
    turned = [weight.T for weight in experts]
    merged = pymerge.merge_tensors(
        torch.from_numpy(base.T.copy()), tensors(turned), "regmean", grams=tensors(grams), in_axis=0, device="cpu"
    )
    np.testing.assert_allclose(merged.numpy(), oracle(experts, grams).T, rtol=1e-10, atol=1e-12)


def test_where_no_inputs_are_it_is_the_mean_and_with_one_model_the_model() -> None:
    (base, *experts), grams = random_case(5, 6)
    for gram in grams:
        gram[2:4] = gram[:, 2:4] = 0.0
    merged = pymerge.merge_tensors(
        torch.from_numpy(base), tensors(experts), "regmean", grams=tensors(grams), device="cpu"
    ).numpy()
    live = [0, 1, 4, 5]
    expected = oracle([each[:, live] for each in experts], [gram[np.ix_(live, live)] for gram in grams])
    np.testing.assert_allclose(merged[:, live], expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(merged[:, 2:4], np.mean(experts, axis=0)[:, 2:4], rtol=1e-12)
    alone = pymerge.merge_tensors(
        torch.from_numpy(base), tensors(experts[:1]), "regmean", grams=tensors(grams[:1]), device="cpu"
    )
    np.testing.assert_allclose(alone.numpy(), experts[0], rtol=1e-12)


def test_grams_that_cannot_be_are_refused() -> None:
    (base, *experts), grams = random_case(5, 7)

    def merge(given: Any) -> None:
        pymerge.merge_tensors(torch.from_numpy(base), tensors(experts), "regmean", device="cpu", **given)

    with pytest.raises(ArgumentError, match="needs Grams of the inputs of each model"):
        merge({})
    with pytest.raises(ArgumentError, match="2 values for 3 experts"):
        merge({"grams": tensors(grams[:2])})
    with pytest.raises(ArgumentError, match=r"its Gram is \[6, 6\], and a weight of \[5, 7\] has 7 inputs"):
        merge({"grams": tensors([*grams[:2], grams[2][1:, 1:]])})
    with pytest.raises(ArgumentError, match="must be the path of a file"):
        merge({"grams": [1.0, 2.0, 3.0]})
    grams[1][0, 1] += 1.0
    with pytest.raises(ArgumentError, match="grams of expert 1 is not symmetric"):
        merge({"grams": tensors(grams)})
    grams[1][0, 1] = np.nan
    with pytest.raises(NonFiniteError, match="grams of expert 1 holds NaN"):
        merge({"grams": tensors(grams)})
    assert HeldGram("here", torch.eye(2)).dtype == "F32"


@pytest.fixture
def collected(tmp_path: Path) -> tuple[Path, list[Path], list[Path]]:
    """A base, two models of its family, and files of their Grams."""
    pytest.importorskip("transformers")
    paths = [tmp_path / name for name in ("base", "one", "two")]
    for seed, path in enumerate(paths):
        save_model("gpt2", path, seed)
    write_texts(tmp_path / "data", 12)
    files = [tmp_path / f"{path.name}.safetensors" for path in paths[1:]]
    for path, file in zip(paths[1:], files, strict=True):
        collect(str(path), tmp_path / "data", file, Settings(256, None, 512, 4, "float64", ()), progress=False)
    return paths[0], paths[1:], files


def config_of(base: Path, models: list[Path], files: list[Path], **parameters: Any) -> dict[str, Any]:
    pairs = zip(models, files, strict=True)
    return {
        "merge_method": "regmean",
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": {"grams": str(file)}} for model, file in pairs],
        "parameters": parameters,
    }


def test_a_merge_of_files_is_the_formula_on_every_weight(
    collected: tuple[Path, list[Path], list[Path]], tmp_path: Path
) -> None:
    base, models, files = collected
    config = config_of(base, models, files, reduce_non_diagonal_ratio=0.6)
    plan = pymerge.plan(config, device="cpu")
    assert plan.inputs.grams.keys() == set(files)
    assert {f"input {file}" for file in files} <= plan.identity("any").keys()
    solved = [step for step in plan.steps if step.action.label == "regmean"]
    assert len(solved) == 8
    assert all(step.action.bytes_beside == 2 * 8 * step.shape[0] ** 2 for step in solved)
    report = pymerge.merge(config, tmp_path / "out", device="cpu", progress=False)
    assert not report.warnings
    merged = load_file(tmp_path / "out" / "model.safetensors")
    own = [load_file(path / "model.safetensors") for path in models]
    grams = [load_file(file) for file in files]
    for name, tensor in merged.items():
        each = [weights[name].double().numpy() for weights in own]
        if name in grams[0]:  # Conv1D: d_in x d_out
            expected = oracle([weight.T for weight in each], [gram[name].numpy() for gram in grams], 0.6).T
        else:
            expected = np.mean(each, axis=0)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=2e-5, atol=2e-6, err_msg=name)
    assert recheck(tmp_path / "out").problems == []
    again = pymerge.merge(config, tmp_path / "out", device="cpu", progress=False)
    assert again.resumed_shards or again.bytes_written == 0
    os.utime(files[0], ns=(1, 1))
    with pytest.raises(OutputError, match="one"):
        pymerge.merge(config, tmp_path / "out", device="cpu", progress=False)


def test_what_files_lack_or_have_otherwise_is_told(
    collected: tuple[Path, list[Path], list[Path]], tmp_path: Path
) -> None:
    base, models, files = collected
    grams = load_file(files[0])
    name = "transformer.h.0.mlp.c_fc.weight"
    name = name if name in grams else name.removeprefix("transformer.")

    def changed(**others: torch.Tensor | None) -> Path:
        path = tmp_path / "changed.safetensors"
        kept = {key: tensor for key, tensor in grams.items() if key != name}
        save_file(kept | {key: each for key, each in others.items() if each is not None}, path)
        return path

    with pytest.raises(PlanError, match=rf"{name}.*has no Gram in .*changed\.safetensors.*'exclude'"):
        pymerge.plan(config_of(base, models, [changed(), files[1]]), device="cpu")
    plan = pymerge.plan(config_of(base, models, [changed(), changed()]), device="cpu")
    assert [warning for warning in plan.warnings if "averaged" in warning and name in warning]
    excluded = pymerge.plan(config_of(base, models, [changed(), files[1]], exclude=["c_fc"]), device="cpu")
    assert not excluded.warnings
    with pytest.raises(PlanError, match=r"its Gram is \[3, 3\], and a weight of \[16, 64\] has 16 inputs"):
        pymerge.plan(config_of(base, models, [changed(**{name: torch.eye(3)}), files[1]]), device="cpu")
    with pytest.raises(CheckpointError, match="no Gram; give a file that pymerge collect has written"):
        pymerge.plan(config_of(base, models, [changed(**{name: torch.ones(2, 3)}), files[1]]), device="cpu")
    with pytest.raises(CheckpointError, match=r"no file .*nowhere\.safetensors"):
        pymerge.plan(config_of(base, models, [tmp_path / "nowhere.safetensors", files[1]]), device="cpu")
    config = config_of(base, models, files)
    del config["models"][1]["parameters"]
    with pytest.raises(ConfigError, match=r"has no 'grams', which 'regmean' requires"):
        pymerge.plan(config, device="cpu")


def test_a_file_that_changes_after_the_plan_is_noticed(
    collected: tuple[Path, list[Path], list[Path]], tmp_path: Path
) -> None:
    base, models, files = collected
    plan = pymerge.plan(config_of(base, models, files), device="cpu")
    before = plan.identity("any")
    os.utime(files[1], ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"two\.safetensors: has changed"):
        plan.check_inputs()
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        next(step for step in plan.steps if step.action.label == "regmean").action.grams[1].read()
    after = pymerge.plan(config_of(base, models, files), device="cpu").identity("any")
    assert [part for part in before if before[part] != after[part]] == [f"input {files[1]}"]


def test_a_merger_and_a_merge_in_memory_take_files_and_matrices(
    collected: tuple[Path, list[Path], list[Path]], tmp_path: Path
) -> None:
    base, models, files = collected
    pymerge.merge(config_of(base, models, files), tmp_path / "out", device="cpu", progress=False)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    states = [load_file(path / "model.safetensors") for path in (base, *models)]
    grams = [load_file(file) for file in files]
    for given in ([str(file) for file in files], grams):
        merger = pymerge.Merger(states[0], states[1:], "regmean", grams=given, device="cpu")
        merged = merger.merge()
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_grams_of_another_model_are_doubted(collected: tuple[Path, list[Path], list[Path]]) -> None:
    """Swapped files have every name and size that they should have."""
    base, models, files = collected
    swapped = pymerge.plan(config_of(base, models, files[::-1]), device="cpu").warnings
    for file, model, other in zip(files[::-1], models, models[::-1], strict=True):
        assert f"{file}: was collected from {other}, and is given for {model}; correct the path" in " ".join(swapped)
    assert len(swapped) == 2
    os.utime(models[0] / "model.safetensors")
    (newer,) = pymerge.plan(config_of(base, models, files), device="cpu").warnings
    assert newer.startswith(f"{models[0] / 'model.safetensors'}: is newer than {files[0]}, which was collected from it")


def test_grams_in_memory_of_no_tensor_are_refused() -> None:
    """A weight without a Gram is averaged, so a wrong name would go unseen."""
    base = {"a.weight": torch.randn(4, 3)}
    experts = [{"a.weight": torch.randn(4, 3)} for _ in range(2)]
    good = {"a.weight": torch.eye(3)}
    with pytest.raises(ArgumentError, match=r"grams of expert 1: no tensor is called 'a\.weigth'; a\.weight is"):
        pymerge.merge_state_dicts(base, experts, "regmean", grams=[good, {"a.weigth": torch.eye(3)}])
    merged = pymerge.merge_state_dicts(base, experts, "regmean", grams=[good, good])
    torch.testing.assert_close(merged["a.weight"], (experts[0]["a.weight"] + experts[1]["a.weight"]) / 2)
