"""pymerge multi: merges that build on each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import pymerge as package
from pymerge.api import plan_stages
from pymerge.config.multi import read_stages
from pymerge.errors import ArgumentError, ConfigError, PlanError
from tests.helpers.checkpoints import fine_tuned, llama, llama_config, load_output, pymerge, tree, write_models

CONFIG = """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: mean, parameters: {weight: 0.5}}
  - {model: tall, parameters: {weight: 0.25}}
---
name: tall
merge_method: passthrough
slices:
  - sources: [{model: mean, layer_range: [1, 2]}]
  - sources: [{model: e1, layer_range: [1, 2]}]
---
# the first to run
name: mean
merge_method: linear
models: [{model: e0}, {model: e1}]
parameters: {weight: 1}
---
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    (tmp_path / "multi.yml").write_text(CONFIG)
    return tmp_path


def problems(text: str, models: Path) -> str:
    (models / "bad.yml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_stages(models / "bad.yml", models / "out", None)
    return str(caught.value)


def test_later_stages_use_the_outputs_of_earlier_ones(models: Path) -> None:
    reports = package.multi(models / "multi.yml", models / "out", device="cpu", progress=False)
    stages = models / "out.stages"
    assert [report.output for report in reports] == [stages / "mean", stages / "tall", models / "out"]
    base = llama()
    e0, e1 = fine_tuned(base, 0), fine_tuned(base, 1)
    found = load_output(models / "out")
    up = "model.layers.{}.mlp.up_proj.weight"
    mean = [(e0[up.format(number)].double() + e1[up.format(number)].double()) / 2 for number in range(2)]
    for number, tall in enumerate([mean[1], e1[up.format(1)].double()]):
        origin = base[up.format(number)].double()
        expected = origin + 0.5 * (mean[number] - origin) + 0.25 * (tall - origin)
        torch.testing.assert_close(found[up.format(number)].double(), expected, rtol=1e-6, atol=1e-6)


def test_finished_stages_are_verified_and_the_rest_is_done(models: Path) -> None:
    first = pymerge("multi", models / "multi.yml", models / "out", "--device", "cpu")
    assert first.code == 0, first
    whole = tree(models / "out")
    shutil.rmtree(models / "out")
    again = pymerge("multi", models / "multi.yml", models / "out", "--device", "cpu")
    assert again.code == 0, again
    assert again.out.count("holds this very merge already; verified 21 tensors") == 2
    assert "merged 21 tensors" in again.out
    assert tree(models / "out") == whole
    # Each output stands alone: its recipe names folders, so that it can be computed again.
    deep = pymerge("verify", models / "out", "--deep", "all")
    assert deep.code == 0, deep
    file = models / "out.stages/mean/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    damaged = pymerge("multi", models / "multi.yml", models / "out", "--device", "cpu")
    assert damaged.code == 8
    assert "holds this merge, but damaged" in damaged.errors[0]


def test_dry_run_plans_all_and_writes_nothing(models: Path) -> None:
    before = tree(models)
    done = pymerge("multi", models / "multi.yml", models / "out", "--dry-run", "-I", models / "parts")
    assert done.code == 0, done
    titles = [line for line in done.out.splitlines() if ": into " in line]
    assert titles == [
        f"mean: into {models}/parts/mean",
        f"tall: into {models}/parts/tall",
        f"without name: into {models}/out",
    ]
    assert tree(models) == before


def test_every_stage_is_planned_before_the_first_runs(models: Path) -> None:
    text = CONFIG.replace("model: e1, layer_range: [1, 2]", "model: e1, layer_range: [1, 3]")
    stages = read_stages(text.replace(": e", f": {models}/e").replace(": base", f": {models}/base"), models / "o", None)
    with pytest.raises(
        PlanError, match=r"stage tall: config:\d+: slices\[1\].sources\[0\].layer_range is \[1, 3\], but"
    ):
        plan_stages(stages, device="cpu")
    # A last stage that does not fit what an earlier one will write.
    three = "  - sources: [{model: e1, layer_range: [0, 1]}]\n---\n# the"
    (models / "multi.yml").write_text(CONFIG.replace("---\n# the", three))
    done = pymerge("multi", models / "multi.yml", models / "out", "--device", "cpu")
    assert done.code == 4
    assert f"{models}/out.stages/tall has 9 tensors" in done.errors[0]
    assert not (models / "out.stages").exists()


def test_problems_of_names_have_lines(models: Path) -> None:
    text = problems(CONFIG.replace("model: mean, layer", "model: tall, layer"), models)
    assert "bad.yml:10: 'tall' needs 'tall'; a merge cannot need its own output" in text
    text = problems(CONFIG.replace("{model: e0}", "{model: tall}"), models)
    assert "a merge cannot need its own output" in text
    assert "'mean' needs 'tall'" in text
    assert "'tall' needs 'mean'" in text
    text = problems(CONFIG.replace("{model: tall, p", "{model: tal, p"), models)
    assert "bad.yml:5: models[1].model is 'tal', no stage and no folder; did you mean the stage 'tall'?" in text
    text = problems(CONFIG.replace("name: tall", "name: mean"), models)
    assert "bad.yml:14: name 'mean' stands twice" in text
    text = problems(CONFIG.replace("name: tall\n", ""), models)
    assert "a second document without 'name'" in text
    assert "name is '../x'; it names a folder" in problems(CONFIG.replace("name: tall", "name: ../x"), models)
    text = problems(CONFIG.replace("weight: 1}", "weigt: 1}").replace("weight: 0.25", "weight: x"), models)
    assert "bad.yml:5: models[1].parameters.weight: parameter 'weight' is 'x'" in text
    assert "bad.yml:17: unknown parameter 'weigt' of 'linear'; did you mean 'weight'?" in text
    assert "no document is in it" in problems("# nothing\n", models)
    assert "the config is not a mapping" in problems("- a\n", models)


def test_folders_must_be_said(models: Path) -> None:
    with pytest.raises(ArgumentError, match="no folder for the document without a name; give one"):
        read_stages(models / "multi.yml", None, models / "parts")
    named = "name: x\nmerge_method: linear\nmodels: [{model: /e0, parameters: {weight: 1}}]\n"
    with pytest.raises(ArgumentError, match="every document has a name"):
        read_stages(named, models / "out", models / "parts")
    with pytest.raises(ArgumentError, match="give --intermediate-dir"):
        read_stages(named, None, None)
    assert [stage.out for stage in read_stages(named, None, models / "parts")] == [models / "parts/x"]


def test_a_config_of_several_documents_is_sent_to_multi(models: Path) -> None:
    done = pymerge("merge", models / "multi.yml", models / "out")
    assert done.code == 2
    assert "multi.yml:6: more than one YAML document; run them with `pymerge multi`, or keep one" in done.errors[0]
