"""Which model is it? Another spelling, a link, a folder of links lead to the same one; equal copies do not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pymerge
from pymerge.config.merge_config import load_config
from pymerge.config.references import KnownModels
from pymerge.errors import ConfigError, PlanError
from pymerge.planner.inputs import open_models
from pymerge.wemoe.config import expert_names, load_build_config
from tests.helpers.checkpoints import Tensors, fine_tuned, llama, llama_config, load_output, write_models


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base), shards=2, files={"tokenizer.json": "{}"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def _link(model: Path) -> str:
    link = model.with_name(f"link-{model.name}")
    link.symlink_to(model)
    return str(link)


def _snapshot(model: Path) -> str:
    """Links to files, as in the Hub's cache."""
    folder = model.with_name(f"models--org--{model.name}") / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    return str(folder)


def _hard_links(model: Path) -> str:
    folder = model.with_name(f"hard-{model.name}")
    folder.mkdir()
    for file in model.iterdir():
        os.link(file, folder / file.name)
    return str(folder)


SPELLINGS: dict[str, Callable[[Path], str]] = {
    "dots": lambda model: f"./elsewhere/../{model.name}/",
    "absolute": str,
    "from the working directory": lambda model: os.path.relpath(model),
    "link": _link,
    "link to a link": lambda model: _link(Path(_link(model))),
    "folder of links": _snapshot,
    "hard links": _hard_links,
}


def write(where: Path, **config: Any) -> Path:
    (where / "merge.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return where / "merge.yml"


def merged(where: Path, out: str, **config: Any) -> Tensors:
    pymerge.merge(write(where, **config), where / out, device="cpu", progress=False)
    return load_output(where / out)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_base_that_is_listed_again_is_no_expert(spelling: str, method: str, where: Path) -> None:
    config: dict[str, Any] = {"merge_method": method, "base_model": "base", "parameters": {"weight": 1.0}}
    experts = [{"model": "e0"}, {"model": "e1"}]
    expected = merged(where, "expected", models=experts, **config)
    again = SPELLINGS[spelling](where / "base")
    assert same(merged(where, "out", models=[*experts, {"model": again}], **config), expected)
    config["base_model"] = again
    assert same(merged(where, "other", models=[{"model": "base"}, *experts], **config), expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_expert_that_is_listed_again_counts_twice_and_says_so(spelling: str, where: Path) -> None:
    again = SPELLINGS[spelling](where / "e0")
    path = write(
        where,
        merge_method="task_arithmetic",
        base_model="base",
        models=[{"model": "e0"}, {"model": "e1"}, {"model": again}],
        parameters={"weight": 1.0},
    )
    (warning,) = load_config(path).warnings
    assert f"models[2] is models[0] again: {again!r} is the same model as 'e0', which counts twice" in warning


def test_a_copy_is_another_model(where: Path) -> None:
    shutil.copytree(where / "e0", where / "copy")
    path = write(
        where,
        merge_method="linear",
        models=[{"model": "e0"}, {"model": "copy"}],
        parameters={"weight": 1.0},
    )
    config = load_config(path)
    assert config.warnings == ()
    assert [entry.model for entry in config.models] == ["e0", "copy"]


def test_a_folder_that_shares_some_files_is_another_model(where: Path) -> None:
    shared = where / "shared"
    shared.mkdir()
    for file in (where / "e0").iterdir():
        if "00002-of" in file.name:
            shutil.copy(file, shared / file.name)
        else:
            (shared / file.name).symlink_to(file)
    known = KnownModels(where)
    assert [known.first(name) for name in ("e0", "shared", "./shared")] == ["e0", "shared", "shared"]


def test_a_file_is_the_model_of_its_folder(where: Path) -> None:
    torch.manual_seed(0)
    single = where / "single"
    single.mkdir()
    shutil.copy(where / "e0/model-00001-of-00002.safetensors", single / "model.safetensors")
    known = KnownModels(where)
    assert [known.first(name) for name in ("single", "single/model.safetensors")] == ["single", "single"]


def test_slices_know_the_base_by_any_name(where: Path) -> None:
    def source(model: str) -> dict[str, Any]:
        return {"model": model, "layer_range": [0, 2]}

    config: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 1.0}}
    expected = merged(where, "expected", slices=[{"sources": [source("base"), source("e0")]}], **config)
    link = _link(where / "base")
    found = merged(where, "out", slices=[{"sources": [source(link), source("e0")]}], **config)
    assert same(found, expected)
    with pytest.raises(ConfigError, match="stands more than once in"):
        load_config(write(where, slices=[{"sources": [source(link), source("base"), source("e0")]}], **config))


def test_towers_know_the_base_by_any_name(where: Path) -> None:
    config: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 1.0}}
    expected = merged(where, "expected", models=[{"model": "e0"}], **config)
    tower = {"models": [{"model": _link(where / "base")}, {"model": "e0"}]}
    assert same(merged(where, "out", modules={"text_decoder": tower}, **config), expected)


def test_a_base_alone_by_two_names_is_refused(where: Path) -> None:
    link = _link(where / "base")
    path = write(where, merge_method="ties", base_model="base", models=[{"model": link}], parameters={"weight": 1.0})
    with pytest.raises(ConfigError, match="lists only the base; add the models to merge"):
        load_config(path)


def test_later_stages_know_models_by_any_name(where: Path) -> None:
    link = _link(where / "base")
    text = (
        "name: first\nmerge_method: linear\nmodels: [{model: e0}, {model: e1}]\nparameters: {weight: 1}\n---\n"
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: FIRST}, {model: LINK}]\n"
        "parameters: {weight: 1}\n"
    )
    (where / "multi.yml").write_text(text.replace("FIRST", "first").replace("LINK", link))
    pymerge.multi(where / "multi.yml", where / "out", device="cpu", progress=False)
    base, e0, e1 = llama(), fine_tuned(llama(), 0), fine_tuned(llama(), 1)
    for name, tensor in load_output(where / "out").items():
        torch.testing.assert_close(tensor, (e0[name] + e1[name]) / 2)
    assert base.keys() == load_output(where / "out").keys()
    # The output of a stage by its path is that stage.
    (where / "multi.yml").write_text(text.replace("FIRST", str(where / "out.stages/first")).replace("LINK", "base"))
    shutil.rmtree(where / "out.stages")
    shutil.rmtree(where / "out")
    reports = pymerge.multi(where / "multi.yml", where / "out", device="cpu", progress=False)
    assert [report.output.name for report in reports] == ["first", "out"]


def test_the_tokenizer_of_a_model_by_another_name(where: Path) -> None:
    path = write(
        where,
        merge_method="linear",
        models=[{"model": "e0"}, {"model": "e1"}],
        parameters={"weight": 1.0},
        tokenizer_source=_link(where / "e1"),
    )
    settings = load_config(path).tokenizer
    assert settings is not None
    assert settings.source == "e1"
    text = path.read_text().replace(settings.source, "base").replace("link-base", "base")
    path.write_text(text.split("tokenizer_source")[0] + "tokenizer_source: base\n")
    settings = load_config(path).tokenizer
    assert settings is not None
    assert settings.source == "base"  # the word, not the folder


def test_a_build_knows_its_base_by_any_name(where: Path) -> None:
    def experts(again: str) -> list[str]:
        models = [{"model": str(where / "e0")}, {"model": again}]
        return expert_names(load_build_config({"base_model": str(where / "base"), "models": models})[0])

    assert experts(_link(where / "base")) == ["e0"]
    with pytest.raises(ConfigError, match="is listed twice"):
        experts(_link(where / "e0"))


def test_names_that_turn_out_to_be_one_model_are_refused(where: Path) -> None:
    """As of the Hub, where it is known only after a download."""
    config = load_config(write(where, merge_method="linear", models=[{"model": "e0"}], parameters={"weight": 1.0}))
    (where / "again").symlink_to(where / "e0")
    with pytest.raises(PlanError, match="'again' and 'e0' are one model"):
        open_models(config, ["e0", "again"])
