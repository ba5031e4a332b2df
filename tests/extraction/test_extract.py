"""`pymerge extract`: factors against NumPy's SVD, what is stated against what is lost, refusals, the same bytes."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.reader import Reader
from pymerge.errors import ArgumentError, NonFiniteError, OutputError, PlanError
from pymerge.extraction import api
from pymerge.extraction.measure import Measured, measure
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.targets import TensorPair
from pymerge.output.verify import verify
from tests.helpers.checkpoints import Tensors, change, llama, llama_config, pymerge, tree, write_model

PREFIX = "base_model.model."
ALGORITHMS = ("random", "gram", "svd")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A small Llama, and a model whose projections differ from it by five directions of falling size and noise."""
    base = llama(hidden=48, inner=64)
    write_model(tmp_path / "base", base, config=llama_config(base))
    write_model(tmp_path / "tuned", {name: tensor + moved(name, tensor) for name, tensor in base.items()})
    return tmp_path


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if "_proj" not in name:
        return 0.001 * torch.randn(tensor.shape, generator=generator)
    left, right = (torch.linalg.qr(torch.randn(size, 5, generator=generator))[0] for size in tensor.shape)
    leading: torch.Tensor = left @ torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05])) @ right.mT
    return leading + 1e-4 * torch.randn(tensor.shape, generator=generator)


def products(folder: Path) -> Tensors:
    """B A of each adapted tensor, by its name in the base."""
    found = load_file(folder / "adapter_model.safetensors")
    names = [name for name in found if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix(PREFIX).replace("lora_A.", ""): found[name.replace("lora_A", "lora_B")].double()
        @ found[name].double()
        for name in names
    }


def taus(folder: Path) -> Tensors:
    base, tuned = (load_file(folder / name / "model.safetensors") for name in ("base", "tuned"))
    return {name: tuned[name].double() - base[name].double() for name in base}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_factors_are_the_leading_ones(models: Path, algorithm: str, rank: int) -> None:
    report = api.extract(
        models / "base", models / "tuned", models / "out", rank=rank, algorithm=algorithm, progress=False
    )
    assert {each.name for each in report.tensors if each.place == "factors"} == set(products(models / "out"))
    stated = {each.name: each.error for each in report.tensors}
    for name, found in products(models / "out").items():
        tau = taus(models)[name].numpy()
        u, s, vh = np.linalg.svd(tau)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert np.linalg.norm(found.numpy() - best) < 2e-5 * np.linalg.norm(tau)
        assert stated[name] == pytest.approx(np.linalg.norm(tau - found.numpy()) / np.linalg.norm(tau), rel=1e-6)
        assert stated[name] == pytest.approx(math.sqrt((s[rank:] ** 2).sum() / (s**2).sum()), rel=1e-3)
    total = sum(float(tau.square().sum()) for name, tau in taus(models).items() if name in stated)
    lost = total - sum((1 - stated[name] ** 2) * float(tau.square().sum()) for name, tau in taus(models).items())
    assert report.error_of_all == pytest.approx(math.sqrt(lost / total), rel=1e-3)


def test_energy_takes_the_smallest_ranks_that_keep_it(models: Path) -> None:
    before = 0
    for energy in (0.5, 0.9, 0.99, 0.999):
        out = models / f"out{energy}"
        report = api.extract(models / "base", models / "tuned", out, energy=energy, progress=False)
        for each in report.tensors:
            if each.place == "factors":
                squares = np.linalg.svd(taus(models)[each.name].numpy(), compute_uv=False) ** 2
                assert each.rank == int((np.cumsum(squares) < energy * squares.sum()).sum()) + 1
                assert each.error <= math.sqrt(1 - energy) + 1e-6
        ranks = sum(each.rank for each in report.tensors)
        assert ranks >= before
        before = ranks


def test_epsilon_and_max_rank(models: Path) -> None:
    report = api.extract(models / "base", models / "tuned", models / "a", sv_epsilon=0.15, progress=False)
    assert {each.rank for each in report.tensors if each.place == "factors"} == {3}
    report = api.extract(models / "base", models / "tuned", models / "b", sv_epsilon=1e9, progress=False)
    assert {each.rank for each in report.tensors if each.place == "factors"} == {1}
    report = api.extract(models / "base", models / "tuned", models / "c", energy=0.9999, max_rank=2, progress=False)
    assert report.rank == 2


@pytest.mark.parametrize("split", ["sqrt", "a", "b"])
def test_singular_values_go_where_they_are_asked_for(models: Path, split: str) -> None:
    api.extract(models / "base", models / "tuned", models / "out", rank=2, split=split, progress=False)
    found = load_file(models / "out" / "adapter_model.safetensors")
    name = f"{PREFIX}model.layers.0.mlp.up_proj"
    norms = found[f"{name}.lora_A.weight"].norm(dim=1), found[f"{name}.lora_B.weight"].norm(dim=0)
    s = torch.tensor([1.0, 0.5])
    wanted = {"sqrt": (s.sqrt(), s.sqrt()), "a": (s, torch.ones(2)), "b": (torch.ones(2), s)}[split]
    torch.testing.assert_close(norms, wanted, rtol=0.01, atol=0.01)


def test_what_is_stated_is_that_of_rounded_factors(models: Path) -> None:
    wide = api.extract(models / "base", models / "tuned", models / "wide", rank=5, progress=False)
    narrow = api.extract(models / "base", models / "tuned", models / "narrow", rank=5, dtype="bfloat16", progress=False)
    assert 1e-3 < narrow.error < 1e-2
    assert wide.error < narrow.error
    name = "model.layers.0.mlp.up_proj.weight"
    tau = taus(models)[name]
    error = float((tau - products(models / "narrow")[name]).norm() / tau.norm())
    assert next(each.error for each in narrow.tensors if each.name == name) == pytest.approx(error, rel=1e-6)


def test_large_tables_are_read_twice_and_not_held(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = partial(api.extract, models / "base", models / "tuned", rank=2, include=["up_proj"], progress=False)
    ranks(models / "held", algorithm="gram")
    monkeypatch.setattr("pymerge.extraction.deltas.HELD", 100)
    monkeypatch.setattr("pymerge.extraction.deltas.BLOCK", 100)
    ranks(models / "read")
    for name, found in products(models / "read").items():
        torch.testing.assert_close(found, products(models / "held")[name], rtol=0, atol=1e-6)


def test_only_what_is_asked_for(models: Path) -> None:
    api.extract(
        models / "base", models / "tuned", models / "out", include=["mlp"], exclude=["down", r"\.1\."], progress=False
    )
    assert set(products(models / "out")) == {f"model.layers.0.mlp.{word}_proj.weight" for word in ("gate", "up")}
    config = json.loads((models / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]


def test_what_has_not_changed_is_left_out(models: Path) -> None:
    base = load_file(models / "base" / "model.safetensors")
    change(models / "tuned", lambda tensors: tensors.update({n: base[n] for n in base if "q_proj" in n or "norm" in n}))
    report = api.extract(models / "base", models / "tuned", models / "out", progress=False)
    assert not [name for name in products(models / "out") if "q_proj" in name]
    said = "\n".join(report.lines())
    assert "layernorm" not in said
    assert "model.embed_tokens.weight" in said
    assert "--max-lora-rank 16" in said


def test_the_same_bytes_for_any_threads_and_memory(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, before = [], torch.get_num_threads()
    try:
        for threads, memory in ((1, "2GiB"), (2, "2GiB"), (3, "3MiB")):
            monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
            torch.set_num_threads(threads)
            out = models / f"out{threads}"
            api.extract(models / "base", models / "tuned", out, algorithm="gram", memory=memory, progress=False)
            api.extract(models / "base", models / "tuned", out / "r", rank=3, algorithm="random", progress=False)
            outputs.append({name: data for name, data in tree(out).items() if "adapter" in name or "extract" in name})
    finally:
        torch.set_num_threads(before)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) == 6


def test_a_finished_output_is_verified_and_another_refused(models: Path) -> None:
    first = api.extract(models / "base", models / "tuned", models / "out", rank=2, progress=False)
    again = api.extract(models / "base", models / "tuned", models / "out", rank=2, progress=False)
    assert again.already_done
    assert again.error == first.error
    assert verify(models / "out").problems == []
    before = tree(models / "out")
    with pytest.raises(OutputError, match="overwrite"):
        api.extract(models / "base", models / "tuned", models / "out", rank=3, progress=False)
    assert tree(models / "out") == before
    api.extract(models / "base", models / "tuned", models / "out", rank=3, progress=False, overwrite=True)
    assert verify(models / "out").problems == []


def test_publishing_that_was_stopped_is_completed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    extract = partial(api.extract, models / "base", models / "tuned", rank=2, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("pymerge.output.directory.publish_files", stopped)
        with pytest.raises(KeyboardInterrupt):
            extract(models / "out")
    assert not (models / "out" / "adapter_config.json").exists()
    extract(models / "out")
    extract(models / "other")
    written = [(models / folder / "adapter_model.safetensors").read_bytes() for folder in ("out", "other")]
    assert written[0] == written[1]
    assert verify(models / "out").problems == []


def test_what_is_measured_is_kept_when_it_is_interrupted(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.extraction.parts.PART_BYTES", 60_000)
    extract = partial(api.extract, models / "base", models / "tuned", rest="full", progress=False)
    extract(models / "whole")
    names: list[str] = []

    def counted(reader: Reader, target: TensorPair, options: ExtractOptions) -> Measured[torch.Tensor]:
        names.append(target.name)
        if stopping and target.name == "model.layers.1.self_attn.q_proj.weight":
            raise KeyboardInterrupt
        return measure(reader, target, options)

    monkeypatch.setattr("pymerge.extraction.extracted.measure", counted)
    stopping = True
    with pytest.raises(KeyboardInterrupt):
        extract(models / "out")
    assert os.listdir(models / "out") == [".pymerge"]
    first = set(names)
    with pytest.raises(OutputError, match="holds an unfinished merge"):
        extract(models / "out", rank=3)
    names.clear()
    stopping = False
    report = extract(models / "out")
    assert report.resumed_parts > 0
    assert first - set(names)
    assert any("finished parts" in line for line in report.lines())
    assert tree(models / "out") == tree(models / "whole")


def test_refusals_come_before_any_output(models: Path) -> None:
    nothing = r"equals .*base in all that would be adapted"
    large = {name: tensor.clone() for name, tensor in load_file(models / "base" / "model.safetensors").items()}
    large["model.layers.0.mlp.up_proj.weight"] += 3e38
    write_model(models / "large", large)
    write_model(models / "same", load_file(models / "base" / "model.safetensors"))
    cases: list[tuple[Path, dict[str, object], type[Exception], str]] = [
        (models / "same", {}, PlanError, nothing),
        (models / "base", {}, PlanError, "is the base itself"),
        (models / "large", {"dtype": "float16"}, NonFiniteError, "float16 cannot hold; give --dtype"),
        (models / "large", {"algorithm": "random", "rank": 3}, ArgumentError, "--algorithm svd"),
        (models / "tuned", {"energy": "0.5"}, ArgumentError, "energy is '0.5'"),
        (models / "tuned", {"include": ["no such"]}, PlanError, "--include"),
        (models / "tuned", {"memory": "100KiB"}, PlanError, "--memory"),
        (models / "tuned", {"rank": 2, "energy": 0.5}, ArgumentError, "rank and energy"),
        (models / "tuned", {"rank": 0}, ArgumentError, "rank is 0"),
        (models / "tuned", {"energy": 1.5}, ArgumentError, "energy is 1.5"),
        (models / "tuned", {"split": "c"}, ArgumentError, "split is 'c'"),
        (models / "tuned", {"exclude": ["("]}, ArgumentError, "regular expression"),
        (models / "tuned", {"algorithm": "random", "energy": 0.5}, ArgumentError, "max_rank"),
    ]
    for model, options, error, text in cases:
        with pytest.raises(error, match=text):
            api.extract(models / "base", model, models / "out", progress=False, **options)  # type: ignore[arg-type]
        assert not (models / "out").exists()
    with pytest.raises(OutputError, match="holds the input"):
        api.extract(models / "base", models / "tuned", models / "base", progress=False, overwrite=True)


def test_nan_is_named(models: Path) -> None:
    change(models / "tuned", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), math.nan))
    with pytest.raises(NonFiniteError, match=r"tuned.*model\.layers\.1\.mlp\.up_proj\.weight.*\[3, 4\]"):
        api.extract(models / "base", models / "tuned", models / "out", progress=False)
    assert not (models / "out").exists()


def test_what_the_base_has_no_place_for_is_left_out(models: Path) -> None:
    """A longer vocabulary, and a head for a task."""

    def longer(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(3, 48)])
        tensors["score.weight"] = torch.ones(2, 48)

    api.extract(models / "base", models / "tuned", models / "plain", progress=False)
    change(models / "tuned", longer)
    report = api.extract(models / "base", models / "tuned", models / "out", progress=False)
    weights = [(models / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "out")]
    assert weights[0] == weights[1]
    assert any("from row 32 on, they are left out" in warning for warning in report.warnings)
    assert any("score.weight" in warning for warning in report.warnings)


def test_tensors_that_the_model_has_not(models: Path) -> None:
    change(models / "tuned", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(PlanError, match="missing_tensors"):
        api.extract(models / "base", models / "tuned", models / "out", progress=False)
    api.extract(models / "base", models / "tuned", models / "out", missing_tensors="base", progress=False)
    assert len(products(models / "out")) == 13


def test_the_command(models: Path) -> None:
    models_of = ("--base", models / "base", "--model", models / "tuned")
    done = pymerge("extract", *models_of, "--rank", "2", models / "out")
    assert done.code == 0, done
    assert "lost " in done.out
    assert "--max-lora-rank" in done.out
    assert pymerge("verify", models / "out").code == 0
    assert "without --deep" in pymerge("verify", "--deep", models / "out").errors[0]
    done = pymerge("extract", *models_of, "--rest", "full", "--dry-run", models / "other")
    assert "14 tensors would get factors" in done.out
    assert "in modules_to_save: 5 tensors: " in done.out
    assert not (models / "other").exists()
    done = pymerge("extract", *models_of, "--rank", "0", models / "other")
    assert "rank is 0" in done.errors[0]
    assert not (models / "other").exists()


def test_the_command_as_json(models: Path) -> None:
    """What would be done, the report of what was, and that of what is there already."""
    command = ("extract", "--base", models / "base", "--model", models / "tuned", "--rank", "2", "--json")
    planned = json.loads(pymerge(*command, "--dry-run", models / "out").out)
    assert not (models / "out").exists()
    assert planned["summary"]["options"]["rank"] == 2
    assert planned["summary"]["factors"] == 14
    places = {each["name"]: each["place"] for each in planned["tensors"]}
    assert places["model.layers.0.mlp.up_proj.weight"] == "factors"
    assert places["model.norm.weight"] == "nowhere"
    made = json.loads(pymerge(*command, models / "out").out)
    assert (made["output"], made["rank"], made["already_done"]) == (str(models / "out"), 2, False)
    written = json.loads((models / "out" / "pymerge_extract.json").read_text())
    assert made["error"] == written["error"]
    assert [each["name"] for each in made["tensors"]] == [each["name"] for each in written["tensors"]]
    again = json.loads(pymerge(*command, models / "out").out)
    assert again["already_done"]
    assert again["tensors"] == made["tensors"]


def test_integers_are_not_to_be_ruled_by_a_config(models: Path) -> None:
    """`pymerge extract` has no rules for layers, and does not advise them."""
    for folder, number in (("base", 1), ("tuned", 2)):
        change(models / folder, lambda tensors, number=number: tensors.update(codes=torch.full((3,), number)))
    with pytest.raises(PlanError, match="list models that agree") as caught:
        api.extract(models / "base", models / "tuned", models / "out", progress=False)
    assert "layers:" not in str(caught.value)
