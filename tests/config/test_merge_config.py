"""Configs as typed models: precedence, filters, gradients, names of models, and a form that depends on meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymerge.architecture.roles import Kind, Rule
from pymerge.config.merge_config import MergeConfig, canonical, load_config, participants, resolve
from pymerge.config.references import hub_reference, model_path
from pymerge.errors import CheckpointError, ConfigError
from pymerge.methods import get_method
from pymerge.methods.base import PASSES
from tests.helpers.configs import TASK_ARITHMETIC, WUDI, problems


def linear(**parameters: Any) -> MergeConfig:
    entry = {"model": "a", "parameters": {"weight": 1, **parameters}}
    return load_config({"merge_method": "linear", "models": [entry]})


def test_a_file_is_read_with_its_text_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text("# comment\n" + TASK_ARITHMETIC)
    config = load_config(path)
    assert config.merge_method == "task_arithmetic"
    assert [entry.model for entry in config.models] == ["base", "a", "b"]
    assert (config.dtype, config.out_dtype, config.extra_tensors) == ("bfloat16", None, "heads")
    assert config.source_text.startswith("# comment\nmerge_method")
    assert config.directory == tmp_path
    assert load_config(str(path)) == config


def test_text_and_mapping_mean_the_same_as_the_file() -> None:
    text = load_config(WUDI)
    mapping = load_config(
        {"models": ({"model": Path("a")}, {"model": "b"}), "base_model": "base", "merge_method": "wudi"}
    )
    assert canonical(text) == canonical(mapping)
    assert text.directory is None
    assert load_config(mapping.source_text).models == mapping.models


def test_precedence_filters_and_gradients_are_mergekits() -> None:
    config, method = load_config(TASK_ARITHMETIC), get_method("task_arithmetic")
    experts = participants(config, method)
    assert experts == (1, 2)

    def weights(name: str, position: float) -> tuple[float, ...]:
        return resolve(config, method, name, position, experts).model["weight"]

    assert weights("layers.0.self_attn.q", 0.0) == (0.0, 0.75)
    assert weights("layers.1.self_attn.q", 0.25) == (0.25, 0.75)
    assert weights("layers.3.self_attn.q", 0.75) == (0.75, 0.75)
    assert weights("layers.4.self_attn.q", 1.0) == (1.0, 0.75)
    assert weights("layers.4.mlp.up", 1.0) == (0.25, 0.75)
    assert weights("model.Embed", 0.0) == (3.0, 3.0)  # no filter of the model fits: top level
    assert weights("model.embed", 0.0) == (0.75, 0.75)  # filters are case-sensitive
    values = resolve(config, method, "model.norm", 0.0, experts)
    passes = {parameter.name: parameter.default for parameter in PASSES}
    assert values.merge == {"lambda": 0.5, "normalize": False, "int8_mask": False, "rescale": False, **passes}
    assert values.model["density"] == (1.0, 1.0)


def test_a_required_parameter_that_no_filter_gives_is_an_error() -> None:
    config = linear(weight=[{"filter": "mlp", "value": 1}])
    assert resolve(config, get_method("linear"), "mlp.up", 0.0, [0]).model["weight"] == (1.0,)
    with pytest.raises(
        ConfigError, match=r"no entry of 'weight' or 'schedule' of model 'a' fits, and 'linear' needs one"
    ):
        resolve(config, get_method("linear"), "attn.q", 0.0, [0])


def test_the_base_needs_no_weight_unless_it_is_a_model_like_the_others() -> None:
    load_config(TASK_ARITHMETIC.replace("  weight:\n    - {filter: Embed, value: 3}\n", "  weight:\n"))
    text = "merge_method: linear\nbase_model: a\nmodels:\n  - model: a\nparameters: {normalize: false}\n"
    assert problems(text)[0].startswith("config:4: model 'a' has no 'weight'")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(0, 1))
def test_gradient_interpolates_between_equal_knots(knots: list[float], position: float) -> None:
    values = resolve(linear(weight=knots), get_method("linear"), "w", position, [0])
    scaled = position * (len(knots) - 1)
    left = min(int(scaled), max(len(knots) - 2, 0))
    right = min(left + 1, len(knots) - 1)
    expected = knots[left] + (scaled - left) * (knots[right] - knots[left])
    assert values.model["weight"][0] == pytest.approx(expected, abs=1e-9 * max(1.0, *map(abs, knots)))


def test_warnings_name_what_has_no_effect() -> None:
    text = TASK_ARITHMETIC.replace(
        "  lambda: 0.5\n", "  lambda:\n    - value: 0.5\n    - {filter: mlp, value: 1}\n  density: 0.5\n"
    )
    text = text.replace("  - model: b\n", "  - model: b\n  - model: a\n")
    assert load_config(text).warnings == (
        "config:13: models[3] is models[1] again: 'a' counts twice",
        "config:20: 'lambda' has entries that are never used: an earlier one is for all tensors",
        "config:21: parameter 'density' has no effect in 'task_arithmetic'",
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("torch.float16", "float16"),
        ("bf16", "bfloat16"),
        ("fp32", "float32"),
        ("fp16", "float16"),
        ("float64", "float64"),
    ],
)
def test_dtype_names(given: str, expected: str) -> None:
    config = load_config(WUDI + f"dtype: {given}\nout_dtype: torch.bfloat16\n")
    assert (config.dtype, config.out_dtype) == (expected, "bfloat16")


def test_layer_rules() -> None:
    given = {"pattern": "x", "kind": Kind.OTHER}
    made = load_config({"merge_method": "wudi", "base_model": "b", "models": [{"model": "a"}], "layers": [given]})
    assert made.rules == (Rule("x", Kind.OTHER, None, None),)
    config = load_config(
        WUDI + "layers:\n  - {pattern: proj$, kind: linear, in_axis: 0}\n  - {pattern: x, kind: other}\n"
    )
    assert config.rules == (Rule("proj$", Kind.LINEAR, 0, None), Rule("x", Kind.OTHER, None, None))


def test_model_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (tmp_path / "base", tmp_path / "c++", work / "base", work / "b", home / "h"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    path = tmp_path / "config.yml"
    path.write_text(
        "merge_method: wudi\nbase_model: {model: {path: base}}\nmodels: [{model: c++}, {model: {path: b}}]\n"
    )
    config = load_config(path)
    assert config.base_model == "base"
    assert [entry.model for entry in config.models] == ["c++", "b"]
    assert model_path("base", config.directory, config.name) == tmp_path / "base"
    assert model_path("b", config.directory, config.name) == work / "b"
    assert model_path("~/h", config.directory, config.name) == home / "h"
    assert model_path(str(work / "base"), config.directory, config.name) == work / "base"
    with pytest.raises(CheckpointError, match=r"model 'org/x' not found: no .*org/x and no .*work/org/x; correct"):
        model_path("org/x", config.directory, config.name)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("https://huggingface.co/org/name", "write org/name for that model of the Hugging Face Hub"),
        ("https://huggingface.co/org/name/tree/main", "write org/name for that model"),
        ("$HOME/model", "variables are not replaced in a config: write the path itself"),
        (".\\models\\a", "write / for \\ in paths"),
    ],
)
def test_names_that_are_no_paths(name: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        model_path(name, tmp_path, "merge.yml")
    assert f"; {remedy}" in str(caught.value)


def test_names_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local/model").mkdir()
    path = tmp_path / "config.yml"
    path.write_text(
        "merge_method: wudi\nbase_model: org/name-1.5\nmodels:\n  - model: org/a@refs/pr/3\n"
        "  - model: {model: {path: org/b, revision: v1.0}}\n  - model: local/model\n"
    )
    config = load_config(path)
    assert hub_reference("org/name-1.5", config.directory) == ("org/name-1.5", None)
    found = [hub_reference(entry.model, config.directory) for entry in config.models]
    assert found == [("org/a", "refs/pr/3"), ("org/b", "v1.0"), None]
    assert hub_reference("local/misspelt", config.directory) is None
    for name in ("one", "a/b/c", "./a/b", "../b", "/a/b", "~/b", "a/b@"):
        assert hub_reference(name, config.directory) is None


def test_canonical_depends_on_meaning_alone() -> None:
    one = load_config(TASK_ARITHMETIC)
    lines = TASK_ARITHMETIC.replace("0.5\n", "5.0e-1 # half\n").replace("bfloat16", "torch.bfloat16").splitlines()
    other = load_config("\n".join(lines[17:] + lines[12:17] + lines[:12]) + "\n")
    assert json.dumps(canonical(one)) == json.dumps(canonical(other))
    assert canonical(one)["models"][1]["parameters"]["weight"][0] == {
        "filter": "self_attn",
        "value": [0.0, 0.5, 1.0],
    }
    assert canonical(one) != canonical(load_config(TASK_ARITHMETIC.replace("value: 0.25", "value: 0.26")))
    assert canonical(linear(weight=[{"value": 1}])) == canonical(linear(weight=1.0))
    assert canonical(load_config(WUDI)) != canonical(load_config(WUDI + "extra_tensors: ignore\n"))


def test_a_config_is_frozen() -> None:
    config = load_config(WUDI)
    with pytest.raises(ValueError, match="frozen"):
        config.__setattr__("merge_method", "ace")


def test_infinity_where_it_has_a_meaning() -> None:
    ace = WUDI.replace("wudi", "ace")
    config = load_config(ace + "parameters: {gamma_threshold: .inf}\n")
    assert resolve(config, get_method("ace"), "x", 0.0, (0,)).merge["gamma_threshold"] == float("inf")
    assert "finite numbers only" in problems(ace + "parameters: {gamma_threshold: [0.3, .inf]}\n")[0]
