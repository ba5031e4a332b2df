"""Every key of mergekit's config language: it works, is accepted with a note, or is refused with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pymerge import api
from pymerge.errors import ConfigError
from tests.helpers.checkpoints import fine_tuned, llama, llama_config, load_output, write_model

LINEAR = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
SLICE = {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}
SLICED = {"merge_method": "linear", "slices": [SLICE], "parameters": {"weight": 1}}
ARITHMETIC = LINEAR | {"merge_method": "task_arithmetic", "base_model": "a"}
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = llama()
    for name, tensors in (("a", base), ("b", fine_tuned(base, 1, 0.1))):
        write_model(tmp_path / name, tensors, config=llama_config(tensors))
    return tmp_path


def weighted(setting: Any) -> dict[str, Any]:
    entry = {"model": "b", "parameters": {"weight": setting}}
    return LINEAR | {"models": [{"model": "a", "parameters": {"weight": 1}}, entry], "parameters": {"normalize": False}}


def changed(**more: Any) -> dict[str, Any]:
    """A sliced config with keys of its slice added or replaced."""
    return SLICED | {"slices": [SLICE | more]}


# Config, dtype of the output, and for layers 0 and 1 the factors of a and b in the MLP's weight.
HALF = ((0.5, 0.5), (0.5, 0.5))
WORKS: dict[str, tuple[dict[str, Any], torch.dtype, Any]] = {
    "models": (LINEAR, torch.float32, HALF),
    "slices": (SLICED, torch.float32, HALF),
    "modules, models": (
        LINEAR | {"models": None, "modules": {"default": {"models": LINEAR["models"]}}},
        torch.float32,
        HALF,
    ),
    "modules, slices": (LINEAR | {"models": None, "modules": {"default": {"slices": [SLICE]}}}, torch.float32, HALF),
    "modules, parameters": (
        {
            "merge_method": "task_arithmetic",
            "base_model": "a",
            "modules": {"default": {"models": [{"model": "b"}], "parameters": {"weight": 0.25}}},
            "parameters": {"weight": 9},
        },
        torch.float32,
        ((0.75, 0.25), (0.75, 0.25)),
    ),
    "base_model": (ARITHMETIC, torch.float32, ((0, 1), (0, 1))),
    "base_model of a slice": (
        changed(base_model="b") | {"merge_method": "task_arithmetic", "base_model": "a"},
        torch.float32,
        ((1, 0), (1, 0)),
    ),
    "parameters of a slice": (
        changed(parameters={"normalize": False, "weight": [1, 3]}),
        torch.float32,
        ((1, 1), (3, 3)),
    ),
    "parameters of a source": (
        changed(sources=[SLICE["sources"][0] | {"parameters": {"weight": 3}}, SLICE["sources"][1]]),
        torch.float32,
        ((0.75, 0.25), (0.75, 0.25)),
    ),
    "dtype": (LINEAR | {"dtype": "bfloat16"}, torch.bfloat16, HALF),
    "dtype with prefix": (LINEAR | {"dtype": "torch.float16"}, torch.float16, HALF),
    "out_dtype": (LINEAR | {"dtype": "float32", "out_dtype": "bfloat16"}, torch.bfloat16, HALF),
    "model as a mapping": (
        LINEAR | {"models": [{"model": {"model": {"path": "a"}}}, {"model": {"path": "b"}}]},
        torch.float32,
        HALF,
    ),
    "number": (weighted(2), torch.float32, ((1, 2), (1, 2))),
    "number in scientific notation": (weighted(1e-2), torch.float32, ((1, 0.01), (1, 0.01))),
    "gradient": (weighted([0, 0.5]), torch.float32, ((1, 0), (1, 0.5))),
    "filters": (
        weighted([{"filter": "attn", "value": 9}, {"filter": "mlp", "value": [2, 1]}, {"value": 7}]),
        torch.float32,
        ((1, 2), (1, 1)),
    ),
    "filter for all": (weighted([{"filter": "*", "value": 2}]), torch.float32, ((1, 2), (1, 2))),
    "filter without a list": (weighted({"value": 2}), torch.float32, ((1, 2), (1, 2))),
    "boolean as a number": (LINEAR | {"parameters": {"weight": 1, "normalize": 0}}, torch.float32, ((1, 1), (1, 1))),
}


@pytest.mark.parametrize("case", WORKS)
def test_works(case: str, models: Path) -> None:
    config, dtype, factors = WORKS[case]
    (models / "merge.yml").write_text(
        yaml.safe_dump({key: value for key, value in config.items() if value is not None})
    )
    api.merge(models / "merge.yml", models / "out", device="cpu", progress=False)
    found, one, two = load_output(models / "out"), llama(), fine_tuned(llama(), 1, 0.1)
    error = 1e-6 if dtype is torch.float32 else 1e-2
    for number, (first, second) in enumerate(factors):
        name = UP.format(number)
        expected = first * one[name].double() + second * two[name].double()
        assert found[name].dtype is dtype
        torch.testing.assert_close(found[name].double(), expected, rtol=error, atol=error)


NOTES = {
    "residual_weight": (changed(residual_weight=0.1), "'residual_weight' in slices[0] has no effect, nor has it in"),
    "int8_mask": (ARITHMETIC | {"parameters": {"weight": 1, "int8_mask": True}}, "'int8_mask' has no effect in"),
    "density": (ARITHMETIC | {"parameters": {"weight": 1, "density": 0.5}}, "'density' has no effect in"),
    "rescale": (ARITHMETIC | {"parameters": {"weight": 1, "rescale": True}}, "'rescale' has no effect in"),
    "entries behind one for all": (
        weighted([{"value": 1}, {"filter": "mlp", "value": 2}]),
        "entries that are never used",
    ),
    "a model twice": (LINEAR | {"models": [{"model": "a"}, {"model": "a"}]}, "models[1] is models[0] again"),
}


@pytest.mark.parametrize("case", NOTES)
def test_is_accepted_with_a_note(case: str, models: Path) -> None:
    config, note = NOTES[case]
    plan = api.plan(yaml.safe_dump(config))
    assert sum(note in warning for warning in plan.warnings) == 1, plan.warnings


REFUSED = {
    "dtype of integers": (LINEAR | {"dtype": "int64"}, "it must be 'float32', 'float16', 'bfloat16' or 'float64'"),
    "lora without a model": (LINEAR | {"models": [{"model": "+x"}]}, "write BASE+ADAPTER, or a path without +"),
    "two of lora": (LINEAR | {"models": [{"model": "a+x+y"}]}, "with more than one adapter"),
    "lora beside the model": (LINEAR | {"models": [{"model": "a", "lora": "x"}]}, "write model: BASE+ADAPTER"),
    "lora with a misspelled key": (
        LINEAR | {"models": [{"model": {"model": {"path": "a"}, "lora": {"path": "x"}, "weigth": 1}}]},
        "unknown key 'weigth' in models[0].model; known keys: model, lora",
    ),
    "revision of a folder": (
        LINEAR | {"models": [{"model": "a@main"}]},
        "give a folder, or a name of the Hugging Face",
    ),
    "override_architecture": (
        LINEAR | {"models": [{"model": {"model": {"path": "a"}, "override_architecture": "X"}}]},
        "delete it: tensors are matched by name and shape",
    ),
    "models and slices": (LINEAR | {"slices": [SLICE]}, "'slices' stands beside 'models'; keep one of them"),
    "models and modules": (LINEAR | {"modules": {"x": {}}}, "'modules' stands beside 'models'; keep one of them"),
    "neither": ({"merge_method": "linear"}, "'models' is missing; add 'models: ...', 'slices: ...' or 'modules: ...'"),
    "an empty module": (
        {"merge_method": "passthrough", "modules": {"default": {}}},
        "'models' is missing in modules.default; add 'models: ...' or 'slices: ...'",
    ),
    "a module of both": (
        {"merge_method": "passthrough", "modules": {"x": {"models": [{"model": "a"}], "slices": [SLICE]}}},
        "'slices' stands beside 'models' in modules.x; keep one of them",
    ),
    "modules as a list": ({"merge_method": "passthrough", "modules": ["x"]}, "it must be a mapping"),
    "layer_range of a model": (
        LINEAR | {"models": [{"model": "a", "layer_range": [0, 1]}]},
        "list the model as a source",
    ),
    "parameter of all at one model": (
        LINEAR | {"models": [{"model": "a", "parameters": {"normalize": True}}]},
        "move it to the top-level 'parameters'",
    ),
    "dtype under parameters": (
        LINEAR | {"parameters": {"dtype": "bfloat16"}},
        "unknown parameter 'dtype' of 'linear'; it is a key of the top level: write it beside 'merge_method'",
    ),
    "tokenizer_source under a model's parameters": (
        LINEAR | {"models": [{"model": "a", "parameters": {"tokenizer_source": "union"}}]},
        "'tokenizer_source' of 'linear'; it is a key of the top level",
    ),
    "merge_method of a slice": (changed(merge_method="linear"), "it belongs to the top level: indent it less"),
    "a misspelt key of a source": (
        changed(sources=[{"model": "a", "layer_rnge": [0, 2]}]),
        "unknown key 'layer_rnge' in slices[0].sources[0]; did you mean 'layer_range'?",
    ),
    "a misspelt key of a slice": (changed(source=[]), "unknown key 'source' in slices[0]; did you mean 'sources'?"),
    "a misspelt key of a module": (
        {"merge_method": "passthrough", "modules": {"x": {"models": [{"model": "a"}], "paramters": {}}}},
        "unknown key 'paramters' in modules.x; did you mean 'parameters'?",
    ),
    "a filter without value": (weighted({"filter": "mlp"}), "has no 'value'; add one"),
    "a text as a number": (weighted("much"), "it must be a number"),
    "name": (LINEAR | {"name": "x"}, "it names a stage of `pymerge multi`: run that, or delete the key"),
    "mergekit-moe": (
        LINEAR | {"experts": [], "gate_mode": "hidden"},
        "mergekit-moe configs build another architecture",
    ),
    "mergekit-evolve": (LINEAR | {"genome": {}}, "unknown key 'genome'"),
    "input_model_parameters": (LINEAR | {"input_model_parameters": {}}, "unknown key 'input_model_parameters'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_with_line_and_remedy(case: str, models: Path) -> None:
    config, remedy = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        api.plan(yaml.safe_dump(config, sort_keys=False))
    assert remedy in str(caught.value)
    assert all(line.startswith("config:") for line in str(caught.value).splitlines())
