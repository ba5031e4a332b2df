"""Outputs put together from layers of several models, against the same sums worked out by hand."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pymerge import api
from pymerge.errors import ConfigError, PlanError
from tests.helpers.checkpoints import (
    Tensors,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    pymerge,
    start,
    tree,
    write_model,
)

BLOCKS = 4


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensors]:
    """a and b have four layers, long has six; all under Llama's names."""
    base = llama(blocks=BLOCKS)
    return {"a": base, "b": fine_tuned(base, 1, 0.1), "long": fine_tuned(llama(blocks=6), 2, 0.1)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensors]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, tensors in weights.items():
        write_model(folder / name, tensors, config=llama_config(tensors), shards=2)
    return folder


def source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": model, "layer_range": [start, stop]}
    return entry | ({"parameters": parameters} if parameters else {})


def part(*sources: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"sources": list(sources), **more}


def merged(models: Path, out: Path, **config: Any) -> Tensors:
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(_with_paths(config, models), sort_keys=False))
    api.merge(file, out, device="cpu", progress=False)
    return load_output(out)


def _with_paths(value: Any, models: Path) -> Any:
    if isinstance(value, dict):
        at = {"model", "base_model"}
        return {
            k: str(models / v) if k in at and isinstance(v, str) else _with_paths(v, models) for k, v in value.items()
        }
    return [_with_paths(item, models) for item in value] if isinstance(value, list) else value


def layer(tensors: Tensors, number: int) -> Tensors:
    """The tensors of one layer by what follows its number."""
    prefix = f"model.layers.{number}."
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def layers_of(tensors: Tensors) -> int:
    return 1 + max(int(found[1]) for name in tensors if (found := re.search(r"layers\.(\d+)\.", name)))


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_a_frankenmerge_has_the_very_bytes_of_its_layers(
    models: Path, weights: dict[str, Tensors], tmp_path: Path
) -> None:
    slices = [part(source("a", 0, 3)), part(source("a", 1, 2)), part(source("long", 2, 6)), part(source("b", 2, 4))]
    found = merged(models, tmp_path / "out", merge_method="passthrough", slices=slices)
    origins = [("a", 0), ("a", 1), ("a", 2), ("a", 1), *(("long", i) for i in range(2, 6)), ("b", 2), ("b", 3)]
    assert layers_of(found) == len(origins)
    for number, (name, own) in enumerate(origins):
        expected = layer(weights[name], own)
        assert layer(found, number).keys() == expected.keys()
        for rest, tensor in layer(found, number).items():
            assert torch.equal(tensor, expected[rest]), (number, rest)
    assert torch.equal(found["model.embed_tokens.weight"], weights["a"]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], weights["b"][name])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == llama_config(weights["a"]) | {"num_hidden_layers": len(origins)}
    done = pymerge("verify", tmp_path / "out", "--deep", "all")
    assert (done.code, done.errors) == (0, [])


def test_passthrough_scales_by_filter(models: Path, weights: dict[str, Tensors], tmp_path: Path) -> None:
    scale = [{"filter": "o_proj", "value": 0}, {"filter": "layers.3.mlp", "value": [0.5, 2.0]}, {"value": 1}]
    slices = [part(source("a", 0, 1)), part(source("a", 2, 4, scale=scale))]
    found = merged(models, tmp_path / "out", merge_method="passthrough", slices=slices)
    assert torch.count_nonzero(found["model.layers.1.self_attn.o_proj.weight"]) == 0
    # A source's filters see its own names, layer 3; and gradients run over the slice.
    expected = 2.0 * weights["a"]["model.layers.3.mlp.up_proj.weight"]
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], expected)
    expected = weights["a"]["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], expected)


def test_gradients_run_over_the_slice_and_precedence_is_source_slice_top(
    models: Path, weights: dict[str, Tensors], tmp_path: Path
) -> None:
    slices = [
        part(source("a", 0, 3, weight=[0.0, 1.0]), source("long", 3, 6, weight=[{"filter": "mlp", "value": 0.5}])),
        part(source("b", 3, 4), source("long", 0, 1), parameters={"weight": [{"filter": "attn", "value": [0, 0.25]}]}),
    ]
    config = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 3.0, "normalize": False}}
    found = merged(models, tmp_path / "out", **config)
    expected: Tensors = {}
    for number in range(3):
        one, two = layer(weights["a"], number), layer(weights["long"], number + 3)
        for rest in one:
            second = 0.5 if "mlp" in rest else 3.0
            expected[f"model.layers.{number}.{rest}"] = number / 2 * one[rest] + second * two[rest]
    one, two = layer(weights["b"], 3), layer(weights["long"], 0)
    for rest in one:
        both = 0.25 if "attn" in rest else 3.0  # t is 1 in a slice of one layer; where no filter fits, the top level
        expected[f"model.layers.3.{rest}"] = both * one[rest] + both * two[rest]
    embedding = "model.embed_tokens.weight"  # t = 0 outside the layers
    expected[embedding] = 0.0 * weights["a"][embedding] + 3.0 * weights["long"][embedding]
    for name in ("model.norm.weight", "lm_head.weight"):
        expected[name] = 3.0 * weights["b"][name] + 3.0 * weights["long"][name]
    assert_same(found, expected)


def test_task_vectors_start_from_the_base_of_the_slice(
    models: Path, weights: dict[str, Tensors], tmp_path: Path
) -> None:
    slices = [
        part(source("a", 1, 3), source("b", 1, 3, weight=0.5)),
        part(source("b", 0, 2), source("long", 4, 6, weight=[1, 0]), base_model="b", parameters={"lambda": 0.25}),
        part(source("a", 3, 4)),
    ]
    config = {"merge_method": "task_arithmetic", "base_model": "a", "slices": slices, "parameters": {"lambda": 2.0}}
    found = merged(models, tmp_path / "out", **config)
    assert layers_of(found) == 5
    for number in range(2):
        base, expert = layer(weights["a"], number + 1), layer(weights["b"], number + 1)
        assert_same(layer(found, number), {rest: base[rest] + 1.0 * (expert[rest] - base[rest]) for rest in base})
        base, expert = layer(weights["b"], number), layer(weights["long"], number + 4)
        factor = 0.25 * (1 - number)
        expected = {rest: base[rest] + factor * (expert[rest] - base[rest]) for rest in base}
        assert_same(layer(found, number + 2), expected)
    # A slice of the base alone is a copy of it, and what is behind the layers goes with it.
    for rest, tensor in layer(found, 4).items():
        assert torch.equal(tensor, layer(weights["a"], 3)[rest])
    assert torch.equal(found["lm_head.weight"], weights["a"]["lm_head.weight"])


@pytest.mark.parametrize("prefixed", ["donor", "source"])
def test_sources_may_differ_by_a_prefix(
    models: Path, weights: dict[str, Tensors], tmp_path: Path, prefixed: str
) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in weights["b"].items()}
    write_model(tmp_path / "bare", bare, config=llama_config(weights["b"]))
    order = ["a", str(tmp_path / "bare")] if prefixed == "donor" else [str(tmp_path / "bare"), "a"]
    slices = [part(source(order[0], 0, 2)), part(source(order[1], 2, 4))]
    found = merged(models, tmp_path / "out", merge_method="passthrough", slices=slices)
    prefix = "model." if prefixed == "donor" else ""
    second = weights["b"] if prefixed == "donor" else weights["a"]
    name = "layers.3.mlp.up_proj.weight"
    assert len(found) == len(weights["a"])
    assert torch.equal(found[prefix + name], second[f"model.{name}"])
    assert torch.equal(found["lm_head.weight"], second["lm_head.weight"])


def test_tied_heads_go_with_the_embedding_of_the_first_slice(tmp_path: Path) -> None:
    tied = llama(tied=True)
    for name, tensors in (("a", tied), ("b", fine_tuned(tied, 1))):
        config = llama_config(tensors, tied=True)
        write_model(tmp_path / name, tensors, config=config)
    slices = [part(source("a", 0, 2)), part(source("b", 0, 2))]
    found = merged(tmp_path, tmp_path / "out", merge_method="passthrough", slices=slices)
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], tied["model.embed_tokens.weight"])


def test_a_head_that_the_last_source_ties_is_its_embedding(models: Path, tmp_path: Path) -> None:
    tied = llama(tied=True)
    write_model(tmp_path / "tied", tied, config=llama_config(tied, tied=True))
    slices = [part(source("a", 0, 2)), part(source(str(tmp_path / "tied"), 0, 2))]
    found = merged(models, tmp_path / "out", merge_method="passthrough", slices=slices)
    assert torch.equal(found["lm_head.weight"], tied["model.embed_tokens.weight"])


def test_a_killed_merge_of_slices_goes_on_to_the_same_bytes(models: Path, tmp_path: Path) -> None:
    slices = [part(source("a", 0, 4), source("b", 0, 4)), part(source("b", 0, 3), source("long", 3, 6))]
    config = _with_paths({"merge_method": "linear", "slices": slices, "parameters": {"weight": [0.2, 0.8]}}, models)
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(config))
    options = ("--max-shard-size", "4KB", "--quiet", "--device", "cpu")
    assert pymerge("merge", file, tmp_path / "whole", *options).code == 0
    running = start("merge", file, tmp_path / "out", *options)
    running.wait_until(lambda: bool(list((tmp_path / "out").rglob("*.safetensors"))))
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    done = pymerge("merge", file, tmp_path / "out", *options)
    assert done.code == 0, done
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("shard", ["5GB", "2KB"])
def test_the_same_bytes_for_any_shard_size_and_order_of_keys(models: Path, tmp_path: Path, shard: str) -> None:
    slices = [part(source("a", 0, 2), source("long", 4, 6)), part(source("a", 1, 4), source("b", 0, 3))]
    config = {"merge_method": "linear", "slices": slices, "parameters": {"weight": [0.3, 0.9]}}
    one = merged(models, tmp_path / "one", **config)
    file = tmp_path / "two.yml"
    file.write_text(yaml.safe_dump(_with_paths(dict(reversed(config.items())), models), sort_keys=True))
    api.merge(file, tmp_path / "two", device="cpu", progress=False, max_shard_size=shard)
    two = load_output(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def problem(models: Path, slices: list[Any], **config: Any) -> str:
    raw = _with_paths({"merge_method": "passthrough", "slices": slices} | config, models)
    with pytest.raises((ConfigError, PlanError)) as caught:
        api.plan(yaml.safe_dump(raw, sort_keys=False))
    return str(caught.value)


def test_problems_of_slices_name_line_value_and_remedy(models: Path, tmp_path: Path) -> None:
    text = problem(models, [part(source("a", 0, 4)), part(source("b", 2, 5))])
    assert re.search(r"config:\d+: slices\[1\].sources\[0\].layer_range is \[2, 5\], but .*/b has 4 layers", text)
    assert "(model.layers.0 to .3); correct the range" in text
    text = problem(models, [part(source("a", 0, 4), source("b", 1, 4))])
    assert "slices[0] must be of sources with equally many layers, not 4 and 3; correct a layer_range" in text
    for bad in ([3, 1], [-1, 2], [0], "0-2", [0, 1.5], [False, True]):
        text = problem(models, [{"sources": [{"model": "a", "layer_range": bad}]}])
        assert "it must be two whole numbers, the first layer and the one behind the last, as in [0, 16]" in text, bad
    assert "'layer_range' is missing in slices[0].sources[0]" in problem(models, [part({"model": "a"})])
    assert "slices[0].sources is empty; list the models to merge" in problem(models, [part()])
    assert "slices is empty; list the slices of the output" in problem(models, [])
    assert "'sources' is missing in slices[0]" in problem(models, [{"parameters": {}}])
    text = problem(models, [part(source("a", 0, 2), merge_method="linear")])
    assert "unknown key 'merge_method' in slices[0]; it belongs to the top level" in text
    text = problem(models, [part(source("a", 0, 2, scale=1), parameters={"scal": 1})])
    assert "unknown parameter 'scal' of 'passthrough'; did you mean 'scale'?" in text
    text = problem(models, [part(source("a", 0, 2)), part(source("b", 0, 1), source("a", 0, 1))])
    assert "'passthrough' merges exactly 1 model, and 2 are listed" in text


def test_problems_of_bases_and_architectures(models: Path, weights: dict[str, Tensors], tmp_path: Path) -> None:
    arithmetic = {"merge_method": "task_arithmetic", "base_model": "a", "parameters": {"weight": 1}}
    text = problem(models, [part(source("b", 0, 2))], **arithmetic)
    assert re.search(r"config:\d+: the base '.*/a' is none of slices\[0\].sources; list it once", text)
    text = problem(models, [part(source("a", 0, 2), source("b", 0, 2))], merge_method="task_arithmetic")
    assert "'base_model' is missing" in text
    wide = llama(hidden=32, blocks=2)
    write_model(tmp_path / "wide", wide, config=llama_config(wide))
    text = problem(models, [part(source("a", 0, 2)), part(source(str(tmp_path / "wide"), 0, 2))])
    assert "tensor 'model.layers.0.self_attn.q_proj.weight' has shape [32, 32], in " in text
    biased = weights["b"] | {"model.layers.1.mlp.up_proj.bias": torch.zeros(24)}
    write_model(tmp_path / "biased", biased, config=llama_config(weights["b"]))
    text = problem(models, [part(source("a", 0, 2)), part(source(str(tmp_path / "biased"), 0, 2))])
    assert "its layers have a tensor 'mlp.up_proj.bias', and those of" in text
    flat = {"w.weight": torch.zeros(3, 3)}
    write_model(tmp_path / "flat", flat)
    text = problem(models, [part(source("a", 0, 2)), part(source(str(tmp_path / "flat"), 0, 2))])
    assert "has no layers under 'model.layers'" in text
    assert "0 lists of layers (no numbered modules)" in problem(models, [part(source(str(tmp_path / "flat"), 0, 2))])


def test_slices_of_models_with_other_vocabularies_are_refused(models: Path, tmp_path: Path) -> None:
    longer = llama(vocabulary=40)
    write_model(tmp_path / "longer", longer, config=llama_config(longer))
    slices = [part(source("a", 0, 2)), part(source(str(tmp_path / "longer"), 0, 2))]
    assert "vocabularies of different sizes; set vocabulary: base" in problem(models, slices)
    text = problem(models, slices, vocabulary="base")
    assert "tensor 'lm_head.weight' has shape [40, 16], and config.json is that of" in text
    assert "take models of one vocabulary for first and last slice" in text


def test_what_has_no_effect_is_said(models: Path) -> None:
    raw = {"merge_method": "passthrough", "slices": [part(source("a", 0, 2), residual_weight=0.5)]}
    plan = api.plan(yaml.safe_dump(_with_paths(raw, models)))
    assert [warning for warning in plan.warnings if "residual_weight" in warning] == [
        "config:3: 'residual_weight' in slices[0] has no effect, nor has it in mergekit"
    ]


@pytest.mark.parametrize("end", ["first", "last"])
def test_a_slice_without_layers_gives_what_stands_outside_of_them(
    end: str, models: Path, weights: dict[str, Tensors], tmp_path: Path
) -> None:
    """At the end: norm and head of one model alone, behind averaged layers. At the start: embeddings."""
    both = part(source("a", 0, 4, weight=0.5), source("b", 0, 4, weight=0.5))
    slices = [part(source("b", 0, 0, weight=1)), both] if end == "first" else [both, part(source("b", 4, 4, weight=1))]
    found = merged(models, tmp_path / "out", merge_method="linear", slices=slices)
    mean = {name: (weights["a"][name] + weights["b"][name]) / 2 for name in weights["a"]}
    alone = ["model.embed_tokens.weight"] if end == "first" else ["model.norm.weight", "lm_head.weight"]
    assert_same(found, mean | {name: weights["b"][name] for name in alone})
    assert all(torch.equal(found[name], weights["b"][name]) for name in alone)
    assert layers_of(found) == BLOCKS


def test_slices_without_layers_elsewhere_are_refused(models: Path) -> None:
    slices = [part(source("a", 0, 2)), part(source("b", 2, 2)), part(source("a", 2, 4))]
    text = problem(models, slices)
    assert "slices[1] has no layers, and is not the first or last of slices that have some; delete it" in text
    assert "slices[0] has no layers" in problem(models, [part(source("a", 2, 2))])
