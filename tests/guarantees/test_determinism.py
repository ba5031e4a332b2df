"""The same bytes whatever the thread count, hash seed, shard size, and order of keys and shards."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.errors import PlanError
from tests.helpers.adapters import factors, write_adapter
from tests.helpers.checkpoints import (
    fine_tuned,
    llama,
    llama_config,
    load_output,
    tree,
    write_config,
    write_model,
    write_models,
)

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [{"filter": "q_proj", "value": 0.3}, {"value": 0.7}]},
    "task_arithmetic": {"weight": 0.4, "lambda": 1.3},
    "breadcrumbs_ties": {"weight": 0.4, "density": 0.6},
    "della": {"weight": 0.4, "density": 0.6, "random_seed": 3},
    "wudi": {"iterations": 20, "lr": "auto"},
    "ace": {},
    "tact": {},
    "weir": {},
    "tsv_m": {},
    "dc_merge": {"core_share": 0.01},
    "star": {"calibrate": "svc", "layer_scale": {"power": 1}},
    "lore": {"iterations": 2},
    "resmerge": {"layer_scale": {"lines": [0.5, 1]}},
    "doge": {"iterations": 5},
    "iso_cts": {"common_space_fraction": 0.7},
}
# Methods that solve adapters by their factors; their configs are called adapters_<method>.
IN_CORE: dict[str, dict[str, Any]] = {
    "wudi": {"iterations": 20, "lr": "auto"},
    "wudi_flow": {},
    "ace": {"gamma_threshold": -1},
    "tsv_m": {},
    "knots": {"merge": "dare", "density": 0.5},
    "core_space": {"merge": "ties"},
}
CONFIGS = [*METHODS, *(f"adapters_{method}" for method in IN_CORE)]
# Large enough that ops split their work between threads, odd enough that no split is even.
SIZES: dict[str, Any] = {"hidden": 144, "inner": 200, "vocabulary": 333, "blocks": 1}

MERGE_ALL = """
import sys, torch, pymerge
from pathlib import Path
from typing import Any
folder, out, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
for config in sorted(folder.glob("*.yml")):
    for backend in ("reference", "auto"):
        pymerge.merge(config, out / f"{config.stem}-{backend}", backend=backend, device="cpu", progress=False)
"""
# (threads, PYTHONHASHSEED) of processes that run MERGE_ALL.
RUNS = ((1, 0), (2, 1), (2, 2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, e0, e1 and one config for each method."""
    folder = tmp_path_factory.mktemp("models")
    base = llama(**SIZES)
    write_models(folder, base, config=llama_config(base))
    for method, parameters in METHODS.items():
        write_config(folder, method, **parameters).rename(folder / f"{method}.yml")
    modules = [name.removesuffix(".weight") for name in base if "_proj" in name]
    for number in range(2):
        write_adapter(folder / f"a{number}", factors(base, modules, seed=number), base_model_name_or_path="base")
    for method, parameters in IN_CORE.items():
        path = write_config(folder, method, **parameters)
        text = path.read_text().replace("model: e", "model: a")
        path.unlink()
        (folder / f"adapters_{method}.yml").write_text(text)
    return folder


def digests(out: Path) -> dict[str, str]:
    """sha256 of every tensor."""
    return {name: digest(tensor) for name, tensor in load_output(out).items()}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def merged(config: Path, out: Path, **settings: Any) -> dict[str, str]:
    pymerge.merge(config, out, device="cpu", progress=False, **settings)
    return digests(out)


@pytest.fixture(scope="module")
def runs(models: Path) -> list[Path]:
    """Outputs of all methods, by the reference and by the backend for CPUs, in each of RUNS."""
    outputs = []
    for threads, seed in RUNS:
        outputs.append(models / f"threads{threads}-seed{seed}")
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", MERGE_ALL, str(models), str(outputs[-1]), str(threads)]
        subprocess.run(command, env=environment, check=True)
    return outputs


def differing(one: dict[str, str], two: dict[str, str]) -> list[str]:
    assert len(one) == 12
    assert one.keys() == two.keys()
    return [name for name in one if one[name] != two[name]]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_hash_seed_changes_no_byte(runs: list[Path], method: str, backend: str) -> None:
    first, second = (out / f"{method}-{backend}" for out in runs[1:])
    assert differing(digests(first), digests(second)) == []
    assert tree(first) == tree(second)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_thread_count_changes_no_byte(runs: list[Path], method: str, backend: str) -> None:
    one, two = (out / f"{method}-{backend}" for out in runs[:2])
    assert differing(digests(one), digests(two)) == []
    assert tree(one) == tree(two)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and the former one again after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(512, 512), (3000, 33), (64, 1024), (128, 1376)])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("wudi", {"iterations": 2}),
        ("wudi", {"iterations": 2, "precision": "float32"}),
        ("ace", {"gamma_threshold": 100, "precision": "float32"}),
        ("ace", {"gamma_threshold": -1}),
        ("wudi_flow", {}),
        ("iso_c", {}),
        ("tsv_m", {}),
    ],
)
def test_the_thread_count_changes_no_bit_of_larger_solutions(
    threads: Callable[[int], None], method: str, parameters: dict[str, Any], shape: tuple[int, int]
) -> None:
    # Shapes on which BLAS and LAPACK divide sums among their threads if they are left to themselves.
    assert_same_on_threads(threads, method, parameters, shape)


@pytest.mark.parametrize("shape", [(1600, 800), (800, 1600), (800, 800)])
@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_the_thread_count_changes_no_bit_of_polar_factors_by_products(
    threads: Callable[[int], None], method: str, shape: tuple[int, int]
) -> None:
    assert_same_on_threads(threads, method, {}, shape)


def assert_same_on_threads(
    threads: Callable[[int], None], method: str, parameters: dict[str, Any], shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(5)
    base = 0.05 * torch.randn(shape, generator=generator)
    experts = [base + 1e-3 * torch.randn(shape, generator=generator) for _ in range(2)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(pymerge.merge_tensors(base, experts, method, device="cpu", **parameters))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("method", CONFIGS)
def test_repeated_runs_in_one_process_give_the_same_bits(models: Path, method: str, tmp_path: Path) -> None:
    first = merged(models / f"{method}.yml", tmp_path / "first")
    assert merged(models / f"{method}.yml", tmp_path / "second") == first


@pytest.mark.parametrize("method", CONFIGS)
def test_the_shard_size_changes_no_tensor(models: Path, method: str, tmp_path: Path) -> None:
    whole = merged(models / f"{method}.yml", tmp_path / "whole")
    parts = merged(models / f"{method}.yml", tmp_path / "parts", max_shard_size="200KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 4
    assert parts == whole


@pytest.mark.parametrize("method", CONFIGS)
def test_the_memory_limit_changes_no_tensor(models: Path, method: str, tmp_path: Path) -> None:
    whole = merged(models / f"{method}.yml", tmp_path / "whole")
    with pytest.raises(PlanError) as refused:
        pymerge.plan(models / f"{method}.yml", memory=1)
    found = re.search(r"give --memory ([\d.]+\w*B) or more", str(refused.value))
    assert found is not None
    plan = pymerge.plan(models / f"{method}.yml", memory=found[1])
    cut = [step for step in plan.steps if len(step.pieces) > 1]
    assert cut or method not in ("linear", "task_arithmetic")
    assert merged(models / f"{method}.yml", tmp_path / "least", memory=found[1]) == whole


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_keys_changes_nothing(models: Path, method: str, tmp_path: Path) -> None:
    plain = merged(models / f"{method}.yml", tmp_path / "plain")
    head, _, rest = (models / f"{method}.yml").read_text().partition("models:\n")
    listed, _, parameters = rest.partition("parameters:\n")
    turned = "".join(reversed(parameters.splitlines(keepends=True)))
    other = models / "other.yaml"
    first = "".join(reversed(head.splitlines(keepends=True)))
    other.write_text((f"parameters:\n{turned}" if turned else "") + f"{first}models:\n{listed}")
    assert merged(other, tmp_path / "turned") == plain


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_shards_and_tensors_in_the_inputs_changes_no_tensor(
    models: Path, method: str, tmp_path: Path
) -> None:
    base = llama(**SIZES)
    config = llama_config(base)
    for folder, turn, shards in ((tmp_path / "a", False, 3), (tmp_path / "b", True, 4)):
        for name, tensors in (("base", base), ("e0", fine_tuned(base, 0)), ("e1", fine_tuned(base, 1))):
            ordered = sorted(tensors, reverse=turn)
            write_model(folder / name, {key: tensors[key] for key in ordered}, shards=shards, config=config)
        (folder / "merge.yml").write_bytes((models / f"{method}.yml").read_bytes())
    first = merged(tmp_path / "a/merge.yml", tmp_path / "a/out")
    assert merged(tmp_path / "b/merge.yml", tmp_path / "b/out") == first
    assert merged(models / f"{method}.yml", tmp_path / "single") == first
