"""Problems of configs: each with its line, what is wrong and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.configs import TASK_ARITHMETIC, WUDI, problems


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
        ("scale: '0.5'", "parameter 'scale' is '0.5'; it must be a number: write 0.5 without quotes"),
        ("scale: ' -1e-3 '", "it must be a number: write -0.001 without quotes"),
        ("scale: 50%", "parameter 'scale' is '50%'; it must be a number: write 0.5"),
        ("scale: 1/4", "it must be a number: write 0.25"),
        ("scale: 1/0", "parameter 'scale' is '1/0'; it must be a number"),
        ("scale: '0,25'", "it must be a number: write 0.25"),
        ("scale: half", "parameter 'scale' is 'half'; it must be a number"),
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
        ("keep_float32: 'no'", "keep_float32 is 'no'; it must be true or false"),
        ("keep_fp32: false", "unknown key 'keep_fp32'; did you mean 'keep_float32'?"),
        ("dtype: auto", "'float64'; delete it to keep the dtypes of the base"),
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
            "  - {model: c+}",
            "models[2].model is 'c+'; write BASE+ADAPTER, or a path without +",
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


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ("[a]", "models[0] is 'a'; it must be a mapping: write '- model: a'"),
        ("{a: {weight: 1}}", "it must be a list: write '- model: ...' for each of them"),
    ],
)
def test_models_written_otherwise(models: str, expected: str) -> None:
    assert expected in problems(f"merge_method: linear\nmodels: {models}\n")[-1]


def test_a_flag_in_quotes() -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, normalize: 'True'}\n"
    (problem,) = problems(text)
    assert problem.endswith("'normalize' is 'True'; it must be true or false: write true without quotes")


@pytest.mark.parametrize("given", ["calibrate: '1'", "layer_scale: '1'"])
def test_no_number_is_proposed_where_none_is_taken(given: str) -> None:
    parameter = given.partition(":")[0]
    text = f"merge_method: task_arithmetic\nbase_model: b\nmodels: [{{model: a}}]\nparameters: {{weight: 1, {given}}}\n"
    (problem,) = problems(text)
    assert f"{parameter!r} is '1'; it must be " in problem
    assert "without quotes" not in problem
