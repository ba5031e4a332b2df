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

WUDI = "merge_method: wudi\nbase_model: base\nmodels:\n  - model: a\n  - model: b\n"
TASK_ARITHMETIC = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - model: a
    parameters:
      weight:
        - filter: self_attn
          value: [0.0, 0.5, 1.0]
        - filter: mlp
          value: 0.25
  - model: b
parameters:
  weight:
    - {filter: Embed, value: 3}
    - {filter: "*", value: 0.75}
  lambda: 0.5
dtype: bfloat16
tokenizer_source: base
"""


def problems(source: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value).splitlines()


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


def test_unknown_keys_are_reported_together_with_lines_and_nearest_names(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(
        "merge_method: wudi\nbase_modl: b\nmodels:\n  - model: a\n    paramters:\n      x: 1\ndtype: int64\n"
    )
    assert problems(path) == [
        f"{path}:1: 'base_model' is missing, and 'wudi' works on differences from it; add 'base_model: ...'",
        f"{path}:2: unknown key 'base_modl'; did you mean 'base_model'?",
        f"{path}:5: unknown key 'paramters' in models[0]; did you mean 'parameters'?",
        f"{path}:7: dtype is 'int64'; it must be 'float32', 'float16', 'bfloat16' or 'float64'",
    ]


def test_misindented_weight_is_pointed_at() -> None:
    text = "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n    weight: 1\n"
    assert problems(text) == [
        "config:3: model 'a' has no 'weight', which 'linear' requires; add it under this model's 'parameters'"
        ", or for all models under the top-level ones",
        "config:4: models[0].parameters is empty; indent its entries under it, or delete it",
        "config:5: unknown key 'weight' in models[0]; it is a parameter of 'linear': put it under 'parameters'",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("iteration: 3", "unknown parameter 'iteration' of 'wudi'; did you mean 'iterations'?"),
        ("gamma_threshold: 3", "it belongs to ace: delete it, or change merge_method"),
        (
            "iterations: 1.5",
            "parameters.iterations: parameter 'iterations' is 1.5; it must be a whole number",
        ),
        ("iterations: [1, 2]", "'iterations' cannot change over layers: give one value"),
        ("rest: [mean]", "parameters.rest is a list; 'rest' cannot change over layers"),
        ("lr: [auto, 1.0]", "parameters.lr is a gradient; write finite numbers only"),
        ("scale: .inf", "parameter 'scale' is inf; it must be a finite number"),
        ("scale: [1, .nan]", "parameters.scale[1]: parameter 'scale' is nan; it must be a finite number"),
        ("scale: 1" + 400 * "0", "it must be a number that fits a float"),
        ("scale: ", "parameters.scale is empty"),
        ("scale: []", "parameters.scale is an empty list"),
        ("scale: {filter: a}", "parameters.scale has no 'value'; add one"),
        (
            "scale: [{filter: a, value: 1, valeu: 1}]",
            "unknown key 'valeu' in parameters.scale[0]; did you mean 'value'?",
        ),
        ("scale: [{filter: 3, value: 1}]", "parameters.scale[0].filter is 3; it must be a text"),
        ("scale: [{filter: a, value: 1}, 2]", "parameters.scale[1] is 2; beside entries with filters"),
        ("exclude: ['(']", "'(' is not a regular expression"),
    ],
)
def test_parameter_problem(line: str, expected: str) -> None:
    found = problems(WUDI + "parameters: {" + line + "}\n")
    assert len(found) == 1, found
    assert found[0].startswith("config:6: ")
    assert expected in found[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("parameters: [scale]", "parameters is ['scale']; write names and values"),
        ("slices: []", "'slices' stands beside 'models'; keep one of them"),
        ("modules: {}", "'modules' stands beside 'models'; keep one of them"),
        ("tokenizer_source: [union]", "tokenizer_source is ['union']; write union, base, or the path of a model"),
        ("tokenizer: {sauce: base}", "unknown key 'sauce' in tokenizer; did you mean 'source'?"),
        ("tokenizer: {pad_to_multiple_of: 0}", "tokenizer.pad_to_multiple_of is 0; it must be a whole number"),
        ("tokenizer: {tokens: {x: a}}", "tokenizer.tokens.x is 'a'; make it a mapping of 'source: ...'"),
        ("tokenizer: {tokens: {x: {force: true}}}", "tokenizer.tokens.x has 'force' and no 'source'"),
        (
            "tokenizer: {tokens: {x: {source: c}}}",
            "source is 'c', which is no model of this merge; write one of base, a",
        ),
        ("tokenizer: {tokens: {x: {source: {kind: zeros}}}}", "source.kind is 'zeros'; did you mean 'zero'?"),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            "tokenizer.tokens.x.source must have one of 'token' and 'token_id'; give exactly one",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: -1}}}}",
            "tokenizer.tokens.x.source.token_id is -1; write a row's number",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, token: y}}}}",
            "tokenizer.tokens.x.source has no 'model'",
        ),
        ("tokeniser_source: base", "unknown key 'tokeniser_source'; did you mean 'tokenizer_source'?"),
        ("chat_template: chatlm", "chat_template 'chatlm' is neither a known name nor a Jinja template; did you mean"),
        ("allow_nonfinite: 'yes'", "allow_nonfinite is 'yes'; it must be true or false"),
        ("extra_tensors: maybe", "extra_tensors is 'maybe'; it must be 'heads', 'error' or 'ignore'"),
        (
            "layers: [{pattern: '(', kind: linear}]",
            "layers[0].pattern is '('; it must be a regular expression",
        ),
        (
            "layers: [{pattern: a, kind: dense}]",
            "layers[0].kind is 'dense'; it must be 'linear', 'embedding'",
        ),
        ("layers: [{pattern: a, kind: linear, in_axis: true}]", "it must be 0 or 1"),
        (
            "layers: [{pattern: a, kind: norm, in_axis: 1}]",
            "layers[0] must be of kind 'linear' to have in_axis",
        ),
        (
            "layers: [{kind: norm, pattern: a, ptern: a}]",
            "unknown key 'ptern' in layers[0]; did you mean 'pattern'?",
        ),
        ("  - model: 7", "models[2].model is 7; it must be a text"),
        ("  - x", "models[2] is 'x'; it must be a mapping"),
        ("  - parameters: {}", "'model' is missing in models[2]; add 'model: ...'"),
        (
            "  - {model: c, merge_method: ace}",
            "unknown key 'merge_method' in models[2]; it belongs to the top level",
        ),
        (
            "  - {model: c+lora}",
            "models[2].model is 'c+lora': '+lora' is not supported yet; merge the adapter",
        ),
        ("  - {model: c@main}", "models[2].model is 'c@main': '@revision' is not supported yet; give a folder, or"),
        ("vocabulary: union", "vocabulary is 'union'; it must be 'strict' or 'base'"),
        (
            "  - {model: {model: {path: c, revision: x}}}",
            "'revision' in models[2].model.model is not supported yet",
        ),
        ("  - {model: {path: c}, layer_range: [0, 2]}", "'layer_range' in models[2] is not supported yet"),
    ],
)
def test_key_problem(line: str, expected: str) -> None:
    found = problems(WUDI + line + "\n")
    assert len(found) == 1, found
    assert found[0].startswith("config:6: ")
    assert expected in found[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "merge_method: wud\nbase_model: b\nmodels: [{model: a}]\n",
            "config:1: unknown merge method 'wud'; did you mean 'wudi'?",
        ),
        (
            "merge_method: wudi\nbase_model: a\nmodels: [{model: ./a}]\n",
            "config:3: models lists only the base",
        ),
        (
            "merge_method: wudi\nbase_model: a\nmodels: []\n",
            "config:3: models is empty; list the models to merge",
        ),
        ("merge_method: wudi\nbase_model: a\n", "'models' is missing; add 'models: ...'"),
        ("base_model: a\nmodels: [{model: b}]\n", "'merge_method' is missing; add 'merge_method: ...'"),
        ("- a\n- b\n", "the config is not a mapping"),
        ("# nothing\n", "the config is not a mapping"),
    ],
)
def test_problem(text: str, expected: str) -> None:
    found = problems(text)
    assert len(found) == 1, found
    assert expected in found[0]


def test_mapping_problems_have_no_lines() -> None:
    assert problems({"merge_method": "wudi", "base_model": "b", "models": [{"model": "a", "modle": 1}]}) == [
        "config: unknown key 'modle' in models[0]; did you mean 'model'?"
    ]
    assert (
        "models[0].model is a set"
        in problems({"merge_method": "wudi", "base_model": "b", "models": [{"model": {1}}]})[0]
    )


def test_merge_parameter_of_a_model_is_refused() -> None:
    text = TASK_ARITHMETIC.replace("- model: b\n", "- model: b\n    parameters: {lambda: 1}\n")
    assert problems(text) == [
        "config:13: parameter 'lambda' in models[2].parameters is one of the whole merge; "
        "move it to the top-level 'parameters'"
    ]


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
    assert values.merge == {"lambda": 0.5, "normalize": False, "int8_mask": False, "rescale": False}
    assert values.model["density"] == (1.0, 1.0)


def test_a_required_parameter_that_no_filter_gives_is_an_error() -> None:
    config = linear(weight=[{"filter": "mlp", "value": 1}])
    assert resolve(config, get_method("linear"), "mlp.up", 0.0, [0]).model["weight"] == (1.0,)
    with pytest.raises(ConfigError, match=r"no entry of 'weight' of model 'a' fits, and 'linear' needs one"):
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
