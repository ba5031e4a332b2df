"""The maker of glyphs8: the folder it leaves, resuming, seeds, nuisances and characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality import glyphs8
from benchmarks.quality import train as suite

TINY = suite.Recipe(
    threads=1,
    config=glyphs8.GlyphVitConfig(stem_channels=(4, 4), hidden_size=8, num_hidden_layers=1, num_attention_heads=2),
    pretrain_steps=3,
    finetune_steps=2,
    test_images=7,
    validation_images=5,
)
TASKS = {name: glyphs8.Task("abc", glyphs8.TASKS[name].nuisance) for name in ("greek", "cyrillic")}
PLAN = suite.Plan(TASKS, pretraining="abc")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.glyphs, "BATCH", 4)
    monkeypatch.setattr(suite.glyphs, "CHECKPOINT_EVERY", 2)


def drawn(work: Path) -> Path:
    """A folder with random pictures of three classes in place of rendered characters."""
    rng = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for part in ("pretraining", *(f"{task}.{part}" for task in TASKS for part in ("train", "validation", "test"))):
        tensors[f"{part}.images"] = torch.randint(256, (12, 32, 32), generator=rng).byte()
        tensors[f"{part}.labels"] = torch.arange(12) % 3
    work.mkdir()
    save_file(tensors, work / "characters.safetensors")
    return work


def make(work: Path, seeds: list[int], recipe: suite.Recipe = TINY, plan: suite.Plan = PLAN) -> dict[str, bytes]:
    """Make a tiny suite; what is in its files, but for the times."""
    with Progress(disable=True) as progress:
        suite.Maker(work, recipe, plan, progress).make(seeds)
    files = sorted(path for path in work.rglob("*") if path.is_file() and path.name != "times.json")
    return {str(path.relative_to(work)): path.read_bytes() for path in files}


def test_the_folder(tmp_path: Path) -> None:
    work = drawn(tmp_path / "whole")
    found = make(work, [0, 1])
    experts = [f"seed-{s}/experts/{t}/{f}" for s in (0, 1) for t in TASKS for f in ("config.json", "model.safetensors")]
    tests = ["seed-0/testset.safetensors", "seed-1/testset.safetensors"]
    base = ["base/config.json", "base/model.safetensors"]
    assert found.keys() == {"suite.json", "characters.safetensors", *base, *tests, *experts}
    about = json.loads(found["suite.json"])
    assert (about["tasks"], about["seeds"]) == (["greek", "cyrillic"], [0, 1])
    assert about["recipe"]["config"]["hidden_size"] == 8
    held_out = load_file(work / tests[0])
    assert {name: tuple(tensor.shape) for name, tensor in held_out.items() if name.startswith("greek")} == {
        "greek.mean": (8,),
        "greek.head": (3, 8),
        "greek.test.images": (7, 32, 32),
        "greek.test.labels": (7,),
        "greek.validation.images": (5, 32, 32),
        "greek.validation.labels": (5,),
    }
    assert held_out["greek.test.labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]  # classes in turn
    stored = load_file(work / experts[1])
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((work / "times.json").read_text()).keys() == {
        "base",
        "heads",
        *(f"seed-{s}/{task}" for s in (0, 1) for task in TASKS),
    }


def test_a_seed_draws_all_but_base_and_heads_anew(tmp_path: Path) -> None:
    work = drawn(tmp_path / "whole")
    found = make(work, [0, 1])
    first, second = (load_file(work / f"seed-{seed}/testset.safetensors") for seed in (0, 1))
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same >= {"greek.mean", "greek.head", "cyrillic.mean", "cyrillic.head"}
    assert not any(name.endswith("images") for name in same)
    assert found["seed-0/experts/greek/model.safetensors"] != found["seed-1/experts/greek/model.safetensors"]


def test_a_killed_run_gives_the_bytes_of_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = make(drawn(tmp_path / "unbroken"), [0])
    work = drawn(tmp_path / "killed")

    def killed(model: object, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "save_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        make(work, [0])  # pretrained, but nothing written except the checkpoint after two of three steps
    assert (work / "pretraining.safetensors").exists()
    assert not (work / "base").exists()
    monkeypatch.undo()
    monkeypatch.setattr(suite.glyphs, "BATCH", 4)
    assert make(work, [0]) == unbroken
    assert json.loads((work / "times.json").read_text())["base"]["resumed"] is True


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    work = drawn(tmp_path / "whole")
    first = make(work, [1])
    times = {path: path.stat().st_mtime_ns for path in work.rglob("model.safetensors")}
    second = make(work, [0])
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    assert {name: second[name] for name in first if name != "suite.json"} == {
        name: content for name, content in first.items() if name != "suite.json"
    }
    assert json.loads(second["suite.json"])["seeds"] == [0, 1]


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    work = drawn(tmp_path / "whole")
    make(work, [0])
    with pytest.raises(SystemExit, match=r"suite\.json .* pass another --work"):
        make(work, [0], suite.Recipe(threads=2, config=TINY.config))


def test_a_suite_with_the_base_of_another_makes_that_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "SUITES", {"owner": PLAN})
    owner, work = drawn(tmp_path / "owner"), drawn(tmp_path / "other")
    found = make(work, [0], plan=suite.Plan(TASKS, base_of="owner"))
    assert found["base/model.safetensors"] == (owner / "base/model.safetensors").read_bytes()
    assert json.loads(found["suite.json"])["base_of"] == "owner"
    assert json.loads((owner / "suite.json").read_text())["seeds"] == []
    assert not (owner / "seed-0").exists()
    made = make(owner, [0])
    assert made["base/model.safetensors"] == found["base/model.safetensors"]
    with pytest.raises(SystemExit, match="pass another --work"):
        make(work, [0])  # a base of its own


NUISANCES = [(name, task) for plan in suite.SUITES.values() for name, task in plan.tasks.items()]


@pytest.mark.parametrize(
    "task", [pytest.param(task, id=f"{name}, {task.nuisance.__name__}") for name, task in NUISANCES]
)
def test_nuisances(task: glyphs8.Task) -> None:
    nuisance = task.nuisance
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(6, 32, 32, generator=rng)
    first, again, other = (nuisance(images.clone(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert 0 <= first.min() < first.max() <= 1
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (nuisance.__name__ in ("blur", "motion", "outlines"))  # the same for all
    assert (first - images).abs().mean() > 0.05


def test_no_character_of_a_task_is_pretrained_on_and_no_face_is_in_two_parts() -> None:
    assert [len(plan.tasks) for plan in suite.SUITES.values()] == [8, 16]
    assert not set(glyphs8.PRETRAINING) & set("".join(task.characters for _, task in NUISANCES))
    assert all(len(set(task.characters)) == len(task.characters) for _, task in NUISANCES)
    assert len({(task.characters, task.nuisance) for _, task in NUISANCES}) == 24  # no task twice
    families = [set(f.split()) for f in (glyphs8.TRAIN_FAMILIES, glyphs8.VALIDATION_FAMILIES, glyphs8.TEST_FAMILIES)]
    assert sum(map(len, families)) == len(set.union(*families))


def test_well_covered_classes_are_renumbered() -> None:
    images = torch.arange(9).byte().view(9, 1, 1)
    labels = torch.tensor([0, 3, 1, 3, 0, 1, 3, 2, 0])
    kept, renumbered = glyphs8.well_covered(images, labels, least=3)
    assert kept.flatten().tolist() == [0, 1, 3, 4, 6, 8]
    assert renumbered.tolist() == [0, 1, 1, 0, 1, 0]


def test_features_in_bfloat16_products(tmp_path: Path) -> None:
    work = drawn(tmp_path / "whole")
    make(work, [0])
    model = suite.load_model(work / "base")
    images = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = model.double()(images.double())
    features = glyphs8.forward(model.float(), images)
    assert features.dtype == torch.float32
    assert (features - exact).abs().max() <= 2**-8 * 4 * exact.abs().max()
