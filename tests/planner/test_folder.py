"""Modules of sentence-transformers, merged with their transformer by the same config into one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.engine.recheck import recheck
from pymerge.errors import CheckpointError, PlanError
from pymerge.output.verify import verify
from tests.helpers.checkpoints import pymerge as command
from tests.helpers.checkpoints import refused, write_config
from tests.helpers.sentences import (
    assert_half_way,
    bert,
    dense,
    merge_all,
    put,
    random,
    write_all,
    write_modules,
    write_sentences,
)

LEGACY = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def refusals(folder: Path) -> list[str]:
    with pytest.raises(PlanError) as caught:
        pymerge.plan(folder / "merge.yml", device="cpu")
    return caught.value.problems


@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_modules_are_merged_into_one_folder(transformer: str, bin_file: bool, tmp_path: Path) -> None:
    write_all(tmp_path, transformer=transformer, bin_file=bin_file)
    write_config(tmp_path, "task_arithmetic")
    found = merge_all(tmp_path)
    assert_half_way(tmp_path / "out", transformer)
    prefix = f"{transformer}/" if transformer else ""
    assert set(found) == {
        f"{prefix}config.json",
        f"{prefix}model.safetensors",
        *(f"{name}/{file}" for name in ("2_Dense", "3_Dense") for file in ("config.json", "model.safetensors")),
        "1_Pooling/config.json",
        "modules.json",
        "config_sentence_transformers.json",
        "README.md",
        "pymerge_config.yml",
        "pymerge_manifest.json",
    }
    assert verify(tmp_path / "out").problems == []
    again = recheck(tmp_path / "out")
    assert "2_Dense/linear.weight" in again.tensors
    assert (again.problems, again.changes) == ([], [])


def test_a_transformer_in_a_folder_of_its_own_may_have_shards(tmp_path: Path) -> None:
    write_all(tmp_path, transformer="0_Transformer")
    (tmp_path / "base/config.json").write_text('{"__version__": "0.3.0"}')  # of sentence-transformers itself
    write_config(tmp_path, "linear")
    found = merge_all(tmp_path, max_shard_size="500B")
    index = json.loads(found["0_Transformer/model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert found["config.json"] == b'{"__version__": "0.3.0"}'
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(bert(0))
    assert verify(tmp_path / "out").problems == []


def test_the_plan_lists_modules_and_filters_find_them(tmp_path: Path) -> None:
    write_all(tmp_path)
    write_config(tmp_path, "task_arithmetic", weight=[{"filter": "2_Dense", "value": 0.0}, {"value": 0.5}])
    done = command("plan", tmp_path / "merge.yml", "--tensors")
    assert "2_Dense/linear.weight" in done.out, done
    plan = pymerge.plan(tmp_path / "merge.yml", device="cpu")
    assert plan.warnings == ()
    assert (plan.tensors, len(plan.files)) == (6, 3)
    merge_all(tmp_path)
    found = load_file(tmp_path / "out/2_Dense/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in dense(6, 6, 8).items())
    last = load_file(tmp_path / "out/3_Dense/model.safetensors")
    assert not torch.equal(last["linear.bias"], dense(4, 4, 6)["linear.bias"])


def test_rules_find_modules_by_their_full_names(tmp_path: Path) -> None:
    write_all(tmp_path)
    rules = [{"pattern": "^2_Dense/linear.weight", "kind": "other"}]
    write_config(tmp_path, "wudi", iterations=2, more=f"layers: {json.dumps(rules)}")
    steps = {step.name: step for step in pymerge.plan(tmp_path / "merge.yml", device="cpu").steps}
    assert not steps["2_Dense/linear.weight"].role.solvable
    assert steps["3_Dense/linear.weight"].role.solvable
    write_config(tmp_path, "wudi", iterations=2, more='layers: [{"pattern": "5_Dense", "kind": "other"}]')
    assert "pattern '5_Dense' finds no tensor" in refusals(tmp_path)[0]


def test_a_selection_of_the_whole_model_is_of_its_modules_too(tmp_path: Path) -> None:
    """Of all elements of a task vector the larger half is kept, wherever they are."""
    write_all(tmp_path)
    change = {name: 100 * tensor for name, tensor in dense(1 + 6, 6, 8).items()}
    save_file(change, tmp_path / "e0/2_Dense/model.safetensors")
    write_config(tmp_path, "ties", experts=1, weight=1.0, density=0.1, scope="model")
    merge_all(tmp_path)
    found = load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"]
    assert (found != dense(6, 6, 8)["linear.weight"]).sum() > 24  # far more than a tenth of 48
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, bert(0)[name])


def test_dtype_counts_for_modules_too(tmp_path: Path) -> None:
    write_all(tmp_path)
    write_config(tmp_path, "linear", more="dtype: bfloat16")
    merge_all(tmp_path)
    for file in sorted((tmp_path / "out").rglob("*.safetensors")):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": True}, "pooling_mode is 'cls', in "),
        (LEGACY | {"pooling_mode_max_tokens": True}, "pooling_mode is 'max+mean'"),
        ({"embedding_dimension": 8, "pooling_mode": "lasttoken"}, "pooling_mode is 'lasttoken'"),
        (LEGACY | {"word_embedding_dimension": 16}, "embedding_dimension is 16"),
    ],
)
def test_pooling_that_differs_is_an_error(other: Mapping[str, Any], said: str, tmp_path: Path) -> None:
    write_all(tmp_path, pooling=LEGACY)
    (tmp_path / "e1/1_Pooling/config.json").write_text(json.dumps(other))
    write_config(tmp_path, "linear")
    text = refused(tmp_path, 4, tmp_path / "e1/1_Pooling/config.json")
    assert said.replace("max+mean", "mean+max") in text.replace("max+mean", "mean+max")


def test_the_same_pooling_as_other_versions_write_it_says_nothing(tmp_path: Path) -> None:
    write_all(tmp_path, pooling=LEGACY)
    text = json.dumps({"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True})
    (tmp_path / "e0/1_Pooling/config.json").write_text(text)
    listed = (tmp_path / "e0/modules.json").read_text().replace(".models.", ".sentence_transformer.modules.pooling.")
    (tmp_path / "e0/modules.json").write_text(listed)
    write_config(tmp_path, "linear")
    assert pymerge.plan(tmp_path / "merge.yml", device="cpu").warnings == ()


def test_modules_that_are_not_alike_are_errors(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "e0/modules.json").unlink()
    (tmp_path / "e1/2_Dense/config.json").write_text('{"activation_function": "torch.nn.modules.linear.Identity"}')
    write_config(tmp_path, "linear")
    found = refusals(tmp_path)
    assert "e0: has no modules.json, and " in found[0]
    assert "'2_Dense', '3_Dense' too" in found[0]
    assert "e1/2_Dense/config.json: activation_function is 'torch.nn.modules.linear.Identity'" in found[1]
    write_modules(tmp_path / "e0", ("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"))
    assert "lists Transformer, Pooling, Dense, that of" in refusals(tmp_path)[0]
    # A layer of another size is an error as it is in a transformer.
    write_sentences(tmp_path / "e2", 3)
    put(tmp_path / "e2/2_Dense", dense(9, 5, 8), {})
    (tmp_path / "merge.yml").write_text((tmp_path / "merge.yml").read_text().replace("e0", "e2").replace("e1", "e2"))
    assert any("tensor 'linear.weight' has shape [5, 8]" in problem for problem in refusals(tmp_path))


def test_a_module_without_its_weights_is_an_error(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "e0/3_Dense/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"3_Dense: has no weights, and modules.json names it as a Dense module"):
        open_checkpoint(tmp_path / "e0")
    (tmp_path / "e0/modules.json").write_text('[{"type": "x.Dense", "path": "../out"}]')
    with pytest.raises(CheckpointError, match="no module with a type and a path inside this folder"):
        open_checkpoint(tmp_path / "e0")


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_a_module_is_not_taken_for_a_transformer_without_weights(transformer: str, tmp_path: Path) -> None:
    folder = write_sentences(tmp_path / "base", 0, transformer=transformer)
    (folder / transformer / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(folder)
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / transformer / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"is an adapter|has no weights"):
        open_checkpoint(folder)


def test_experts_modules_are_matched_by_their_place(tmp_path: Path) -> None:
    """Older folders have the transformer in one of its own, and other numbers."""
    write_all(tmp_path)
    old = write_sentences(tmp_path / "old", 1, transformer="0_BERT", bin_file=True)
    for number, name in ((2, "dense"), (3, "last")):
        (old / f"{number}_Dense").rename(old / name)
    write_modules(old, ("Transformer", "0_BERT"), ("Pooling", "1_Pooling"), ("Dense", "dense"), ("Dense", "last"))
    write_config(tmp_path, "task_arithmetic")
    expected = {name: data for name, data in merge_all(tmp_path).items() if name.endswith("model.safetensors")}
    (tmp_path / "merge.yml").write_text((tmp_path / "merge.yml").read_text().replace("e0", "old"))
    found = merge_all(tmp_path, "other")
    assert {name: found[name] for name in expected} == expected


def test_a_plain_base_leaves_modules_of_experts_out_and_says_so(tmp_path: Path) -> None:
    write_all(tmp_path)
    put(tmp_path / "plain", bert(0), {"model_type": "bert"})
    write_config(tmp_path, "task_arithmetic")
    text = (tmp_path / "merge.yml").read_text().replace("base_model: base", "base_model: plain")
    (tmp_path / "merge.yml").write_text(text)
    done = command("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert done.code == 0, done
    assert "e0: its weights are 'model.safetensors'; beside them, and not used: '2_Dense/model.safetensors'" in done.err
    assert not (tmp_path / "out/modules.json").exists()
    assert not (tmp_path / "out/2_Dense").exists()


def test_the_bases_modules_stand_for_those_of_a_plain_expert_if_it_is_said(tmp_path: Path) -> None:
    write_all(tmp_path)
    put(tmp_path / "plain", bert(1), {"model_type": "bert"})
    write_config(tmp_path, "task_arithmetic", weight=1.0, more="missing_tensors: base")
    (tmp_path / "merge.yml").write_text((tmp_path / "merge.yml").read_text().replace("e0", "plain"))
    (warning,) = pymerge.plan(tmp_path / "merge.yml", device="cpu").warnings
    assert "plain: has no modules.json, and " in warning
    assert warning.endswith("those stand for its own (missing_tensors: base)")
    merge_all(tmp_path)
    found = load_file(tmp_path / "out/2_Dense/model.safetensors")
    assert all(torch.allclose(found[name], tensor) for name, tensor in dense(2 + 6, 6, 8).items())


def test_routers_have_modules_inside(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        folder = tmp_path / name
        for side in ("query_0_StaticEmbedding", "document_0_Transformer"):
            put(folder / side, random(seed, {"embedding.weight": (5, 4)}), {})
        write_modules(folder, ("Router", ""), ("Normalize", "1_Normalize"))
        types = {"query_0_StaticEmbedding": "x.StaticEmbedding", "document_0_Transformer": "x.Transformer"}
        (folder / "router_config.json").write_text(json.dumps({"types": types, "structure": {}}))
    write_config(tmp_path, "linear", weight=1.0)
    merge_all(tmp_path)
    expected = sum(random(seed, {"embedding.weight": (5, 4)})["embedding.weight"].double() for seed in (1, 2)) / 2
    for side in ("query_0_StaticEmbedding", "document_0_Transformer"):
        found = load_file(tmp_path / "out" / side / "model.safetensors")["embedding.weight"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_slices_copy_modules_of_the_base(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "merge.yml").write_text(
        "merge_method: passthrough\nslices:\n  - sources: [{model: base, layer_range: [0, 1]}]\n"
        "  - sources: [{model: e0, layer_range: [0, 1]}]\n"
    )
    merge_all(tmp_path)
    for folder, expected in (("2_Dense", dense(6, 6, 8)), ("3_Dense", dense(4, 4, 6))):
        found = load_file(tmp_path / "out" / folder / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
