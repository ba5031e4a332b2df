"""mergekit-evolve with pymerge as its engine; run by tests/integrations/test_mergekit.py, with mergekit, Ray and the
lm-evaluation-harness installed. There is no GPU: Ray is told of one that nothing uses."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.models.vllm_causallms  # noqa: F401, which evolve takes for loaded
import mergekit.evo.actors as actors
import pytest
import ray
import torch
import yaml
from mergekit.evo.config import EvolMergeConfiguration
from mergekit.evo.genome import ModelGenome
from mergekit.options import MergeOptions
from ray.cluster_utils import Cluster
from torch import Tensor
from transformers import LlamaForCausalLM

import pymerge.integrations.mergekit as integration
from examples.search import letters
from pymerge.integrations.mergekit.__main__ import main
from tests.helpers.checkpoints import load_output

GENOMES: list[tuple[dict[str, Any], float]] = [
    ({"merge_method": "task_arithmetic"}, 0.0),
    ({"merge_method": "linear"}, 0.0),
    ({"merge_method": "ties"}, 0.0),
    ({"merge_method": "task_arithmetic", "layer_granularity": 1, "filters": ["mlp"]}, 0.0),
    ({"merge_method": "slerp", "layer_granularity": 2}, 0.0),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[str]]:
    return letters.make(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One node of this process's, which ray.init and its workers find."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    node = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=node)
    monkeypatch.setenv("RAY_ADDRESS", started.address)
    yield
    ray.shutdown()
    started.shutdown()
    integration.restore_engine()


def genome_of(made: tuple[Path, list[Path], list[str]], **more: Any) -> dict[str, Any]:
    base, experts, _ = made
    return {"models": [str(expert) for expert in experts], "base_model": str(base), **more}


def search(made: tuple[Path, list[Path], list[str]], **more: Any) -> dict[str, Any]:
    tasks = [{"name": name, "metric": "acc,none"} for name in made[2]]
    return {"genome": genome_of(made, **more), "tasks": tasks, "apply_chat_template": False}


@pytest.mark.parametrize(("genome", "within"), GENOMES)
def test_merges_in_memory_are_mergekits(
    made: Any, monkeypatch: pytest.MonkeyPatch, genome: dict[str, Any], within: float
) -> None:
    """The evaluator's own work from genotype to weights; only what the harness then measures is left out."""
    evaluator = actors.InMemoryMergeEvaluator.__ray_metadata__.modified_class
    config = EvolMergeConfiguration.model_validate(search(made, **genome))
    own = ModelGenome(config.genome)
    monkeypatch.setattr(actors, "_eval_model", lambda model, *_, **__: {"score": 0.0, "model": model.model})

    def merged(genotype: Tensor) -> dict[str, Tensor]:
        made_by = evaluator(config, own, MergeOptions(quiet=True))
        twice = [made_by.evaluate_genotype(each)["model"] for each in (torch.rand_like(genotype), genotype)]
        assert twice[0] is twice[1]  # one model, overwritten
        return {name: tensor.detach().clone() for name, tensor in twice[1].state_dict().items()}

    torch.manual_seed(1)
    genotype = own.initial_genotype() + 0.1 * torch.rand_like(own.initial_genotype())
    theirs = merged(genotype)
    changed = integration.replace_engine()
    try:
        assert {"mergekit.evo.actors", "mergekit.plan"} <= {*changed}
        ours = merged(genotype)
    finally:
        integration.restore_engine()
    assert ours.keys() == theirs.keys()
    off = {name: float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items()}
    assert max(off.values()) <= within, {name: value for name, value in off.items() if value > within}
    base = LlamaForCausalLM.from_pretrained(made[0]).bfloat16().state_dict()
    assert not any(torch.equal(ours[name], tensor) for name, tensor in base.items() if tensor.ndim == 2)


def test_the_command_in_memory(made: Any, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors of Ray merge and evaluate; the best merge is then written."""
    monkeypatch.chdir(tmp_path)
    Path("search.yml").write_text(yaml.safe_dump(search(made, merge_method="task_arithmetic")))
    options = ["--in-memory", "--no-merge-cuda", "--max-fevals", "4", "--force-population-size", "4"]
    tasks = ["--task-search-path", str(made[0].parent / "tasks")]
    with pytest.raises(SystemExit) as ended:
        main(["evolve", "search.yml", "--storage-path", "work", *options, *tasks])
    assert ended.value.code == 0
    assert Path("work/best_config.yaml").exists()
    assert Path("work/final_model/pymerge_manifest.json").exists()
    assert load_output(Path("work/final_model")).keys()

    @ray.remote
    def engines() -> list[str]:
        found = [("mergekit.evo.helpers", "run_merge"), ("mergekit.evo.actors", "MergePlanner")]
        return [getattr(importlib.import_module(module), name).__module__ for module, name in found]

    assert ray.get(engines.remote()) == [
        "pymerge.integrations.mergekit.engine",
        "pymerge.integrations.mergekit.in_memory",
    ]


def test_the_command_on_the_disk(made: Any, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges of workers are written, evaluated and removed."""
    monkeypatch.chdir(tmp_path)
    Path("search.yml").write_text(yaml.safe_dump(search(made, merge_method="ties")))
    options = ["--no-merge-cuda", "--max-fevals", "4", "--force-population-size", "4", "--no-save-final-model"]
    tasks = ["--task-search-path", str(made[0].parent / "tasks")]
    with pytest.raises(SystemExit) as ended:
        main(["evolve", "search.yml", "--storage-path", "work", *options, *tasks])
    assert ended.value.code == 0
    assert Path("work/best_config.yaml").exists()
    assert list(Path("work/merged").iterdir()) == []
