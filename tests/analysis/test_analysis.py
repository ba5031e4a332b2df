"""`pymerge report`: its numbers against NumPy in float64, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import pymerge
from pymerge.analysis import Analysis, survey, write_report
from pymerge.analysis.charts import heat_map, line_chart
from pymerge.analysis.measures import cosines
from pymerge.errors import NonFiniteError, PlanError
from tests.helpers import checkpoints
from tests.helpers.checkpoints import change, fine_tuned, llama, llama_config, write_config, write_model, write_models


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Three experts of a tiny Llama: one moved ten times as far, one that left the norms alone."""
    base = llama()
    write_model(tmp_path / "base", base, config=llama_config(base))
    for number, scale in enumerate([1e-3, 1e-2, 2e-3]):
        write_model(tmp_path / f"e{number}", fine_tuned(base, number, scale), config=llama_config(base))
    change(tmp_path / "e2", lambda tensors: tensors.update({name: base[name] for name in base if "norm" in name}))
    return write_config(tmp_path, "task_arithmetic", experts=3)


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """Task vectors of the three experts in float64, name -> [3, elements]."""
    base = llama()
    experts = [load_file(folder / f"e{number}" / "model.safetensors") for number in range(3)]
    return {
        name: np.stack([(expert[name].astype(float) - tensor.double().numpy()).ravel() for expert in experts])
        for name, tensor in base.items()
    }


def test_measures_are_those_of_the_formulas(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.analysis.jobs.PIECE_ELEMENTS", 100)  # several ranges of most tensors
    found = survey(pymerge.plan(config))
    taus = deltas(config.parent)
    assert {tensor.name for tensor in found.tensors} == set(taus)
    for tensor in found.tensors:
        tau = taus[tensor.name]
        np.testing.assert_allclose(tensor.dots, tau @ tau.T, rtol=1e-5, atol=1e-5 * np.square(tau).sum(axis=1).max())
        assert tensor.absolute == pytest.approx(np.abs(tau).sum(), rel=1e-5)
        assert tensor.net == pytest.approx(np.abs(tau.sum(axis=0)).sum(), rel=1e-5)
        assert tensor.unchanged == tuple((tau == 0).sum(axis=1))
        norms = np.log(np.square(tau).sum(axis=1)[np.abs(tau).sum(axis=1) > 0])
        assert tensor.gamma == pytest.approx(norms.var(ddof=1) / norms.mean() ** 2, rel=1e-4)
    whole = np.concatenate(list(taus.values()), axis=1)
    lengths = np.linalg.norm(whole, axis=1)
    np.testing.assert_allclose(cosines(found.dots), whole @ whole.T / np.outer(lengths, lengths), atol=1e-6)
    assert found.base_norm == pytest.approx(math.sqrt(sum(float(t.double().square().sum()) for t in llama().values())))
    assert found.experts == ("e0", "e1", "e2")


def test_numbers_do_not_depend_on_threads_or_memory(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.analysis.jobs.PIECE_ELEMENTS", 100)
    plan = pymerge.plan(config)
    alone = survey(replace(plan, target=replace(plan.target, threads=1)), spectra=3)
    several = survey(replace(plan, target=replace(plan.target, threads=5)), spectra=3)
    assert several == alone
    assert survey(pymerge.plan(config, memory="200KiB"), spectra=3) == alone


def test_a_budget_below_one_piece_is_refused(config: Path) -> None:
    plan = pymerge.plan(config, memory="200KiB")
    small = replace(plan, budget=replace(plan.budget, host=1000))
    with pytest.raises(PlanError, match=r"measuring 'lm_head.weight' holds .* the limit is 1000B .*; give --memory"):
        survey(small)


def test_singular_values(config: Path) -> None:
    found = survey(pymerge.plan(config), spectra=None)
    taus = deltas(config.parent)
    assert len(found.spectra) == 14  # seven linear weights in each of two blocks
    for spectrum in found.spectra:
        for task, (values, rank) in enumerate(zip(spectrum.values, spectrum.ranks, strict=True)):
            exact = np.linalg.svd(taus[spectrum.name][task].reshape(spectrum.shape), compute_uv=False)
            np.testing.assert_allclose(values, exact, rtol=1e-6, atol=1e-8 * exact[0])
            energy = np.cumsum(exact**2) / np.sum(exact**2)
            assert rank == np.searchsorted(energy, 0.9) + 1


def test_a_few_spectra_are_spread_over_roles(config: Path) -> None:
    found = survey(pymerge.plan(config), spectra=9)
    names = [spectrum.name for spectrum in found.spectra]
    assert len({name.split(".", 3)[3] for name in names[:7]}) == 7
    assert all(".layers.0." in name for name in names[:7])
    assert all(".layers.1." in name for name in names[7:])


def test_weights_beyond_the_memory_are_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.analysis.jobs.SPECTRUM_MATRICES", 2**40)
    found = survey(pymerge.plan(config), spectra=2)
    assert found.spectra == ()
    assert len(found.left_out) == 2
    assert found.left_out[0] in _text(write_report(pymerge.plan(config), found, config.parent / "report"))


def test_equal_experts_cancel_nothing_and_opposite_ones_everything(tmp_path: Path) -> None:
    base = llama()
    write_model(tmp_path / "base", base)
    moved = {name: tensor + 2**-10 for name, tensor in base.items()}
    write_model(tmp_path / "e0", moved)
    write_model(tmp_path / "e1", moved)
    write_model(tmp_path / "e2", {name: 2 * base[name] - tensor for name, tensor in moved.items()})
    same = survey(pymerge.plan(write_config(tmp_path, "wudi", experts=2)), spectra=0)
    assert all(tensor.cancellation == pytest.approx(0, abs=1e-6) for tensor in same.tensors)
    assert all(tensor.mean_cosine == pytest.approx(1) for tensor in same.tensors)
    config = tmp_path / "merge.yml"
    config.write_text(config.read_text().replace("e1", "e2"))
    opposite = survey(pymerge.plan(config), spectra=0)
    assert all(tensor.cancellation > 0.99 for tensor in opposite.tensors)
    assert all(tensor.mean_cosine == pytest.approx(-1, abs=1e-3) for tensor in opposite.tensors)


class _Page(HTMLParser):
    """Collects what a page loads, and checks that its tags are closed."""

    VOID = ("meta", "line", "circle", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_command_writes_one_page_that_loads_nothing(config: Path) -> None:
    out = config.parent / "report"
    done = checkpoints.pymerge("report", config, "-o", out)
    assert done.code == 0, done.err
    assert "measuring" in done.err
    text = _text(out / "index.html")
    parser = _Page()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads == []
    assert "url(" not in text
    assert "<script" not in text
    assert "e1) is" in text  # the largest task vector is named
    data = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert len(data["analysis"]["tensors"]) == len(llama())
    assert len(data["analysis"]["spectra"]) == 12


def test_names_are_escaped(config: Path) -> None:
    plan = pymerge.plan(config)
    found = survey(plan, spectra=1)
    odd = Analysis(("<b>x</b>", "a&b", "c"), found.tensors, found.spectra)
    text = _text(write_report(plan, odd, config.parent / "report"))
    assert "<b>" not in text
    assert "a&amp;b" in text


def test_bad_input(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.analysis.jobs.PIECE_ELEMENTS", 10)
    change(tmp_path / "e1", lambda tensors: tensors["model.norm.weight"][12:].fill_(math.nan))
    message = r"e1/model\.safetensors: tensor 'model\.norm\.weight' has \d+ values that are NaN .* at \[12\]; repair"
    with pytest.raises(NonFiniteError, match=message):
        survey(pymerge.plan(config))
    without = config.read_text().replace("base_model: base\n", "").replace("task_arithmetic", "linear")
    config.write_text(without)
    with pytest.raises(PlanError, match="set base_model"):
        survey(pymerge.plan(config))
    done = checkpoints.pymerge("report", config, "-o", tmp_path / "report", "--spectra", "few")
    assert done.code != 0
    assert "--spectra is 'few'; give a number of tensors, or all" in done.err
    assert not (tmp_path / "report").exists()


def test_slices_are_no_whole_models(config: Path) -> None:
    sources = [{"model": "base", "layer_range": [0, 2]}, {"model": "e0", "layer_range": [0, 2]}]
    config.write_text(
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1}\n"
        f"slices: {json.dumps([{'sources': sources}])}\n"
    )
    with pytest.raises(PlanError, match=r"merge\.yml:4: a report is about whole models"):
        survey(pymerge.plan(config))


def test_integer_buffers_scalars_and_empty_tensors(tmp_path: Path) -> None:
    base = {
        "a.weight": torch.randn(4, 6),
        "scale": torch.tensor(2.0),
        "none": torch.zeros(0, 3),
        "ids": torch.arange(5),
    }
    write_models(tmp_path, base)
    found = survey(pymerge.plan(write_config(tmp_path, "task_arithmetic")))
    assert {tensor.name: tensor.elements for tensor in found.tensors} == {"a.weight": 24, "scale": 1, "none": 0}
    assert write_report(pymerge.plan(tmp_path / "merge.yml"), found, tmp_path / "report").is_file()


def test_charts() -> None:
    chart = line_chart({"a": [(0, 1.0), (1, math.nan), (2, 4.0)], "<b>": []}, x_label="x", y_label="y", log=True)
    points = re.findall(r'<polyline class="s0" points="([^"]*)"', chart)
    assert len(points[0].split()) == 2
    assert "&lt;b&gt;" in chart
    assert "Nothing" in line_chart({"a": [(0, math.nan)]}, x_label="x", y_label="y")
    assert heat_map(["a", "b"], ((1.0, -0.5), (math.nan, 1.0))).count('class="minus"') == 1
