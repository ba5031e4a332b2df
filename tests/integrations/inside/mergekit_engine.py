"""pymerge as mergekit's engine; run by tests/integrations/test_mergekit.py, with mergekit installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mergekit.merge
import mergekit.plan
import mergekit.scripts.run_yaml
import pytest
import torch
import yaml
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, InputModelDefinition, MergeConfiguration
from mergekit.graph import Executor
from mergekit.options import MergeOptions
from torch import Tensor
from transformers import AutoConfig

import pymerge.integrations.mergekit as integration
from pymerge.engine.recheck import recheck
from pymerge.errors import ArgumentError, ConfigError, OutputError
from pymerge.integrations.mergekit import engine
from pymerge.integrations.mergekit.__main__ import main
from pymerge.output.verify import verify
from tests.helpers.checkpoints import CARRIED, llama, llama_config, load_output, write_models
from tests.helpers.vocabularies import bpe, write

MERGEKITS = mergekit.merge.run_merge
QUIET = {"quiet": True, "copy_tokenizer": False}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Llamas with biases, which mergekit's planner drops; the working directory is theirs, as mergekit reads names."""
    base = llama()
    for block in range(2):
        for name in "qkvo":
            base[f"model.layers.{block}.self_attn.{name}_proj.bias"] = 0.1 * torch.randn(16)
    write_models(tmp_path, base, experts=3, config={**llama_config(base), "attention_bias": True}, files=CARRIED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    integration.restore_engine()


def config(method: str, experts: int = 2, base: bool = True, **parameters: Any) -> MergeConfiguration:
    """A config; `weight` stands at the models, as mergekit's users write it."""
    weight = parameters.pop("weight", None)
    own = {} if weight is None else {"parameters": {"weight": weight}}
    return MergeConfiguration.model_validate(
        {
            "merge_method": method,
            "models": [{"model": f"./e{number}", **own} for number in range(experts)],
            "parameters": parameters,
            "dtype": "float32",
            **({"base_model": "./base"} if base else {}),
        }
    )


def merged(configuration: MergeConfiguration, out: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors that whatever is mergekit's engine writes."""
    mergekit.merge.run_merge(configuration, str(out), MergeOptions(**{**QUIET, **options}))
    return load_output(out)


def test_it_is_replaced_wherever_it_is_known_and_restored() -> None:
    assert mergekit.scripts.run_yaml.run_merge is MERGEKITS
    changed = integration.replace_engine()
    known = {"mergekit.merge", "mergekit.plan", "mergekit.scripts.run_yaml", __name__}
    assert known >= set(changed) >= {"mergekit.merge", "mergekit.plan"}
    assert integration.replace_engine() == []
    sys.modules.pop("mergekit.scripts.legacy", None)
    imported_later = importlib.import_module("mergekit.scripts.legacy")
    for module in (mergekit.merge, mergekit.scripts.run_yaml, imported_later):
        assert vars(module)["run_merge"] is engine.run_merge
    assert {*changed, "mergekit.scripts.legacy"} == set(integration.restore_engine())
    for module in (mergekit.merge, mergekit.scripts.run_yaml, imported_later):
        assert vars(module)["run_merge"] is MERGEKITS
    assert integration.restore_engine() == []


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": 0.3}),
        ("task_arithmetic", {"weight": 0.3, "lambda": 0.7}),
        ("ties", {"weight": 0.5, "density": 0.4}),
        ("breadcrumbs", {"weight": 0.5, "density": 0.8, "gamma": 0.01}),
        ("model_stock", {}),
        ("karcher", {}),
        ("multislerp", {"weight": 0.5}),
        ("nuslerp", {"weight": 0.4}),
    ],
)
def test_results_are_mergekits_and_nothing_is_dropped(models: Path, method: str, parameters: dict[str, Any]) -> None:
    with_base = method != "linear"
    theirs = merged(config(method, base=with_base, **parameters), models / "theirs")
    assert integration.replace_engine()
    ours = merged(config(method, base=with_base, **parameters), models / "ours")
    assert ours.keys() == load_output(models / "base").keys()
    assert len(ours) == 29
    assert len(theirs) == 21  # mergekit's description of a Llama has no biases
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 2e-6 * max(1.0, float(tensor.abs().max())), name


def test_a_base_that_a_method_does_not_use_is_merged_as_a_model(models: Path) -> None:
    """As mergekit merges it, with the weight of all models."""
    data = config("linear", base=True).model_dump(mode="json", exclude_none=True) | {"parameters": {"weight": 0.5}}
    theirs = merged(MergeConfiguration.model_validate(data), models / "theirs")
    integration.replace_engine()
    ours = merged(MergeConfiguration.model_validate(data), models / "ours")
    assert all((ours[name] - tensor).abs().max() < 1e-6 for name, tensor in theirs.items())
    with pytest.raises(ConfigError, match=r"model '\./base' has no 'weight'"):
        merged(config("linear", weight=0.5, base=True), models / "out")


def test_the_files_beside_the_weights(models: Path) -> None:
    source = "# mine\nmerge_method: linear   # as it is\nmodels: [{model: ./e0, parameters: {weight: 1}}]\n"
    configuration = MergeConfiguration.model_validate(yaml.safe_load(source))
    integration.replace_engine()
    mergekit.merge.run_merge(configuration, "out", MergeOptions(quiet=True), config_source=source)
    out = models / "out"
    assert (out / "mergekit_config.yml").read_bytes() == source.encode()
    assert (out / "pymerge_config.yml").read_bytes() == source.encode()
    assert {"README.md", "config.json", "tokenizer.json", "model.safetensors"} <= {each.name for each in out.iterdir()}

    mergekit.merge.run_merge(
        configuration,
        "plain",
        MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, out_shard_size=4000),
    )
    names = {each.name for each in (models / "plain").iterdir()}
    assert "model.safetensors.index.json" in names
    assert names.isdisjoint({"README.md", "mergekit_config.yml", "tokenizer.json", "tokenizer_config.json"})
    assert names >= {"generation_config.json", "1_Pooling", "pymerge_config.yml"}
    assert load_output(models / "plain").keys() == load_output(out).keys()
    for folder in (out, models / "plain"):
        assert verify(folder).problems == []
        found = recheck(folder)
        assert (len(found.tensors), found.problems, found.changes) == (29, [], [])


def test_another_merge_is_replaced_and_files_of_others_are_not(models: Path) -> None:
    integration.replace_engine()
    first = merged(config("linear", base=False, weight=0.5), models / "out")
    second = merged(config("linear", 3, base=False, weight=0.5), models / "out")
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])
    (models / "full").mkdir()
    (models / "full/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        merged(config("linear", base=False, weight=0.5), models / "full")


def test_seeds(models: Path) -> None:
    integration.replace_engine()
    drawn = config("dare_ties", weight=0.5, density=0.5)
    one, same, other = (
        merged(drawn, models / name, random_seed=seed)["model.layers.0.mlp.up_proj.weight"]
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert "random_seed: 2" in (models / "other/pymerge_config.yml").read_text()
    merged(config("linear", base=False, weight=0.5), models / "linear", random_seed=3)
    assert "random_seed" not in (models / "linear/pymerge_config.yml").read_text()


def test_configs_of_programs(models: Path) -> None:
    """Numbers that YAML 1.1 leaves texts, filters, references as objects."""
    filtered = [ConditionalParameter(value=0.0, filter="o_proj"), ConditionalParameter(value="1e0")]
    configuration = MergeConfiguration(
        merge_method="passthrough",
        models=[InputModelDefinition(model=ModelReference.parse("./e0"), parameters={"scale": filtered})],
    )
    integration.replace_engine()
    ours = merged(configuration, models / "out")
    assert not ours["model.layers.1.self_attn.o_proj.weight"].any()
    assert torch.equal(ours["lm_head.weight"], load_output(models / "e0")["lm_head.weight"])


def test_what_pymerge_refuses_is_an_error_with_a_remedy(models: Path) -> None:
    """Errors are pymerge's own, and name lines where there is a source."""
    integration.replace_engine()
    weighted = config("sce", weight=0.5, select_topk=0.5)
    with pytest.raises(ConfigError, match=r"unknown parameter 'weight' of 'sce'.*delete it"):
        merged(weighted, models / "out")
    source = "merge_method: linear\nmodels:\n  - {model: ./e0, parameters: {weight: 1}}\nmerge_metod: ties\n"
    with pytest.raises(ConfigError, match="mergekit's config:4: unknown key 'merge_metod'"):
        mergekit.merge.run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(source)), "out", MergeOptions(), config_source=source
        )
    with pytest.raises(ArgumentError, match="safetensors only"):
        merged(config("linear", base=False, weight=1.0), models / "out", safe_serialization=False)
    overridden = ModelReference.model_validate({"model": {"path": "./e0"}, "override_architecture": "GPT2LMHeadModel"})
    with pytest.raises(ConfigError, match="override_architecture"):
        merged(MergeConfiguration(merge_method="passthrough", models=[{"model": overridden}]), models / "out")
    assert not (models / "out").exists()


def test_lenient(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    integration.replace_engine(lenient=True)
    lenient = merged(config("sce", weight=0.5, select_topk=0.5), models / "lenient")
    assert "models[1].parameters.weight is left out: 'sce' has no such parameter there" in caplog.text
    strict = merged(config("sce", select_topk=0.5), models / "strict")
    assert all(torch.equal(tensor, strict[name]) for name, tensor in lenient.items())


def test_token_tables_have_a_row_for_each_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit cuts padding rows off, unless pad_to_multiple_of is given."""
    for seed, name in enumerate(("base", "e0", "e1")):
        write(tmp_path / name, bpe(["a", "b", "c"], [f"<{name}>"]), seed, rows=20)
    monkeypatch.chdir(tmp_path)
    for name, tokens in (("short", {"tokenizer_source": "union"}), ("long", {"tokenizer": {"source": "./e0"}})):
        data = config("task_arithmetic", weight=0.5).model_dump(mode="json", exclude_none=True) | tokens
        theirs = merged(MergeConfiguration.model_validate(data), tmp_path / f"{name}-theirs")
        integration.replace_engine()
        ours = merged(MergeConfiguration.model_validate(data), tmp_path / f"{name}-ours")
        integration.restore_engine()
        shapes = {key: tensor.shape for key, tensor in ours.items()}
        assert shapes == {key: tensor.shape for key, tensor in theirs.items()}
        assert shapes["lm_head.weight"][0] < 20
        assert (tmp_path / f"{name}-ours/tokenizer.json").exists()


def test_the_commands_of_mergekit(models: Path) -> None:
    """Commands of mergekit, by its own command lines."""
    recipe = "# kept\nmerge_method: ties\nbase_model: ./base\nparameters: {weight: 0.5, density: 0.4}\n"
    (models / "one.yml").write_text(recipe + "models: [{model: ./e0}, {model: ./e1}]\ndtype: float32\n")
    (models / "all.yml").write_text(
        f"name: first\n{recipe}models: [{{model: ./e0}}, {{model: ./e1}}]\n---\n"
        "merge_method: linear\nparameters: {weight: 1e0}\nmodels: [{model: first}, {model: ./e2}]\n"
    )

    def run(*words: str) -> None:
        with pytest.raises(SystemExit) as ended:  # as click ends a command
            main([*words, "--quiet"])
        assert ended.value.code == 0

    run("yaml", "one.yml", "one")
    assert (models / "one/mergekit_config.yml").read_bytes() == (models / "one.yml").read_bytes()
    run("multi", "all.yml", "-I", "parts", "--out-path", "all")
    first = load_output(models / "parts/first")
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_output(models / "one").items())
    assert (models / "all/pymerge_manifest.json").exists()
    run("legacy", "old", "--merge", "./e0", "--merge", "./e1", "--base-model", "./base", "--weight", "0.5")
    assert (models / "old/pymerge_manifest.json").exists()
    for words, code in ((["nothing"], 2), (["--help"], 0), ([], 0)):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == code


def test_an_error_is_one_line_and_an_exit_code(models: Path) -> None:
    (models / "wrong.yml").write_text("merge_method: passthrough\nmodels: [{model: ./e0}]\nmerge_metod: 3\n")
    command = [sys.executable, "-m", "pymerge.integrations.mergekit", "yaml", "wrong.yml", "wrong"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: mergekit's config:3: unknown key 'merge_metod'; did you mean 'merge_method'?\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_merges_in_memory_as_evolve_plans_them(models: Path, method: str) -> None:
    """Tasks of the planner that evolve finds, carried out by mergekit's own executor. mergekit's planner fails here."""

    configuration = config(method, base=method != "linear", weight=0.5)
    options = MergeOptions(**QUIET)
    arch = get_architecture_info(configuration, options)
    integration.replace_engine()
    wanted = merged(configuration, models / "out")
    tasks = mergekit.plan.MergePlanner(
        configuration, arch, options, AutoConfig.from_pretrained("./e0")
    ).plan_in_memory()
    found = {task.weight_info.name: tensor for task, tensor in Executor(tasks).run(quiet=True)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
