"""Folders of several models: modules of sentence-transformers merged with the transformer, other weights copied."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pymerge
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.engine.recheck import recheck
from pymerge.errors import CheckpointError, PlanError
from pymerge.output.verify import verify
from tests.helpers.checkpoints import pymerge as command
from tests.helpers.checkpoints import refused, start, tree, write_config
from tests.helpers.imports import modules_after
from tests.helpers.sentences import bert, dense, put, random, write_modules, write_sentences

LEGACY = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def write_all(folder: Path, **settings: Any) -> Path:
    for seed, name in enumerate(("base", "e0", "e1")):
        write_sentences(folder / name, seed, **settings)
    return folder


def merge(folder: Path, out: str = "out", **limits: Any) -> dict[str, bytes]:
    pymerge.merge(folder / "merge.yml", folder / out, device="cpu", progress=False, **limits)
    return tree(folder / out)


def assert_half_way(out: Path, transformer: str = "", base: int = 0) -> None:
    """All tensors are base + (e0 - base) / 2 + (e1 - base) / 2, by float64, file by file."""

    def check(file: Path, of: Any) -> None:
        first, *others = ({name: tensor.double() for name, tensor in of(seed).items()} for seed in (base, 1, 2))
        found = load_file(file)
        assert found.keys() == first.keys()
        for name, tensor in found.items():
            expected = first[name] + sum(0.5 * (other[name] - first[name]) for other in others)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)

    check(out / transformer / "model.safetensors", bert)
    check(out / "2_Dense/model.safetensors", lambda seed: dense(seed + 6, 6, 8))
    check(out / "3_Dense/model.safetensors", lambda seed: dense(seed + 4, 4, 6))


def refusals(folder: Path) -> list[str]:
    with pytest.raises(PlanError) as caught:
        pymerge.plan(folder / "merge.yml", device="cpu")
    return caught.value.problems


@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_modules_are_merged_into_one_folder(transformer: str, bin_file: bool, tmp_path: Path) -> None:
    write_all(tmp_path, transformer=transformer, bin_file=bin_file)
    write_config(tmp_path, "task_arithmetic")
    found = merge(tmp_path)
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
    found = merge(tmp_path, max_shard_size="500B")
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
    merge(tmp_path)
    found = load_file(tmp_path / "out/2_Dense/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in dense(6, 6, 8).items())
    last = load_file(tmp_path / "out/3_Dense/model.safetensors")
    assert not torch.equal(last["linear.bias"], dense(4, 4, 6)["linear.bias"])


def test_rules_find_modules_by_their_full_names(tmp_path: Path) -> None:
    write_all(tmp_path)
    rules = [{"pattern": "^2_Dense/linear.weight", "kind": "other"}]
    write_config(tmp_path, "wudi", iterations=2, more=f"layers: {json.dumps(rules)}")
    steps = {step.name: step for step in pymerge.plan(tmp_path / "merge.yml", device="cpu").steps}
    assert not steps["2_Dense/linear.weight"].layer.solvable
    assert steps["3_Dense/linear.weight"].layer.solvable
    write_config(tmp_path, "wudi", iterations=2, more='layers: [{"pattern": "5_Dense", "kind": "other"}]')
    assert "pattern '5_Dense' finds no tensor" in refusals(tmp_path)[0]


def test_dtype_counts_for_modules_too(tmp_path: Path) -> None:
    write_all(tmp_path)
    write_config(tmp_path, "linear", more="dtype: bfloat16")
    merge(tmp_path)
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


def test_experts_modules_are_matched_by_their_place(tmp_path: Path) -> None:
    """Older folders have the transformer in one of its own, and other numbers."""
    write_all(tmp_path)
    old = write_sentences(tmp_path / "old", 1, transformer="0_BERT", bin_file=True)
    for number, name in ((2, "dense"), (3, "last")):
        (old / f"{number}_Dense").rename(old / name)
    write_modules(old, ("Transformer", "0_BERT"), ("Pooling", "1_Pooling"), ("Dense", "dense"), ("Dense", "last"))
    write_config(tmp_path, "task_arithmetic")
    expected = {name: data for name, data in merge(tmp_path).items() if name.endswith("model.safetensors")}
    (tmp_path / "merge.yml").write_text((tmp_path / "merge.yml").read_text().replace("e0", "old"))
    found = merge(tmp_path, "other")
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


def test_routers_have_modules_inside(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        folder = tmp_path / name
        for side in ("query_0_StaticEmbedding", "document_0_Transformer"):
            put(folder / side, random(seed, {"embedding.weight": (5, 4)}), {})
        write_modules(folder, ("Router", ""), ("Normalize", "1_Normalize"))
        types = {"query_0_StaticEmbedding": "x.StaticEmbedding", "document_0_Transformer": "x.Transformer"}
        (folder / "router_config.json").write_text(json.dumps({"types": types, "structure": {}}))
    write_config(tmp_path, "linear", weight=1.0)
    merge(tmp_path)
    expected = sum(random(seed, {"embedding.weight": (5, 4)})["embedding.weight"].double() for seed in (1, 2)) / 2
    for side in ("query_0_StaticEmbedding", "document_0_Transformer"):
        found = load_file(tmp_path / "out" / side / "model.safetensors")["embedding.weight"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def beside(seed: int) -> dict[str, Tensor]:
    return random(50 + seed, {"weight": (4, 8), "bias": (4,)})


def write_beside(folder: Path, seed: int) -> None:
    """Weights of something else (a projection, a codec, a head), and the model once more in other forms."""
    put(folder, bert(seed), {"model_type": "bert"})
    torch.save(beside(seed), folder / "colbert_linear.pt")
    save_file({"v_head.summary.weight": torch.full((1, 8), float(seed))}, folder / "v_head.safetensors")
    put(folder / "speech_tokenizer", beside(seed), {"codec": 1})
    put(folder / "original", random(seed, {"tok.weight": (3, 3)}), {"whole": 1})
    put(folder / "stage1", bert(seed + 9), {"model_type": "bert"})
    torch.save(bert(seed + 9), folder / "pytorch_model.bin")
    save_file(bert(seed + 9), folder / "ema.safetensors")
    (folder / "tf_model.h5").write_bytes(b"x")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    torch.save({}, folder / "optimizer.pt")


def test_weights_of_something_else_are_copied_and_other_forms_are_left_out(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        write_beside(tmp_path / name, seed)
    write_config(tmp_path, "task_arithmetic")
    done = command("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert done.code == 0, done
    found, base = tree(tmp_path / "out"), tree(tmp_path / "base")
    copied = {
        "colbert_linear.pt",
        "v_head.safetensors",
        "speech_tokenizer/model.safetensors",
        "speech_tokenizer/config.json",
    }
    own = {"config.json", "model.safetensors", "README.md", "pymerge_config.yml", "pymerge_manifest.json"}
    assert set(found) == copied | own
    assert all(found[name] == base[name] for name in copied)
    lines = done.err.splitlines()
    line = next(line for line in lines if "base: copied as they are, not merged" in line)
    assert all(name in line for name in copied if "config" not in name)
    unused = ("adapter_config.json", "adapter_model.safetensors", "ema.safetensors", "original/model.safetensors")
    unused += ("pytorch_model.bin", "stage1/model.safetensors", "tf_model.h5")
    for model in ("base", "e0", "e1"):
        line = next(line for line in lines if f"/{model}: its weights are 'model.safetensors'; beside" in line)
        assert all(f"'{name}'" in line for name in unused), line
        assert "optimizer" not in line
    assert verify(tmp_path / "out").problems == []
    # What was copied is watched like everything else.
    with (tmp_path / "out/colbert_linear.pt").open("r+b") as stream:
        stream.write(b"xx")
    assert "colbert_linear.pt: is not as it was written" in verify(tmp_path / "out").problems[0]


def test_a_copied_file_that_changes_is_another_merge(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        write_beside(tmp_path / name, seed)
    write_config(tmp_path, "linear")
    merge(tmp_path)
    torch.save(beside(7), tmp_path / "base/colbert_linear.pt")
    refused(tmp_path, 8, "colbert_linear.pt", existed=True)
    assert command("merge", tmp_path / "merge.yml", tmp_path / "out", "--overwrite").code == 0
    assert tree(tmp_path / "out")["colbert_linear.pt"] == (tmp_path / "base/colbert_linear.pt").read_bytes()


def test_a_plan_says_what_would_be_copied(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        write_beside(tmp_path / name, seed)
    write_config(tmp_path, "linear")
    warnings = pymerge.plan(tmp_path / "merge.yml", device="cpu").warnings
    assert any("copied as they are, not merged: 'colbert_linear.pt'" in warning for warning in warnings)


def test_interrupted_and_replaced(tmp_path: Path) -> None:
    """Killed at many moments and started again, and over an earlier merge: the same bytes."""
    write_all(tmp_path)
    torch.save(beside(0), tmp_path / "base/colbert_linear.pt")
    write_config(tmp_path, "task_arithmetic")
    expected = merge(tmp_path, "whole", max_shard_size="400B")
    arguments = ("merge", tmp_path / "merge.yml", tmp_path / "out", "--max-shard-size", "400B")
    for number in range(4):
        running = start(*arguments)
        running.send_after(0.25 + 0.09 * number, signal.SIGKILL)
        running.wait()
    done = command(*arguments)
    assert done.code == 0, done
    found = tree(tmp_path / "out")
    found.pop(".pymerge/lock", None)  # of a run that was killed when all was in place
    assert found == expected
    done = command(*arguments)
    assert "holds this very merge already" in done.out
    write_config(tmp_path, "linear")
    assert command(*arguments).code == 8
    assert command(*arguments, "--overwrite").code == 0
    assert verify(tmp_path / "out").problems == []


def test_stages_pass_modules_on(tmp_path: Path) -> None:
    write_all(tmp_path)
    torch.save(beside(0), tmp_path / "base/colbert_linear.pt")
    (tmp_path / "multi.yml").write_text(
        "name: first\nmerge_method: task_arithmetic\nbase_model: base\n"
        "models: [{model: e0}, {model: e1}]\nparameters: {weight: 1}\n---\n"
        "merge_method: linear\nmodels: [{model: base}, {model: first}]\nparameters: {weight: 0.5}\n"
    )
    pymerge.multi(tmp_path / "multi.yml", tmp_path / "out", device="cpu", progress=False)
    assert_half_way(tmp_path / "out")
    assert (tmp_path / "out/colbert_linear.pt").read_bytes() == (tmp_path / "base/colbert_linear.pt").read_bytes()
    again = pymerge.multi(tmp_path / "multi.yml", tmp_path / "out", device="cpu", progress=False)
    assert all(report.already_done for report in again)


def test_a_small_file_of_torch_beside_does_not_wait_for_pytorch(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        put(tmp_path / name, random(seed, {"up.weight": (512, 256)}), {})
        torch.save(beside(seed), tmp_path / name / "colbert_linear.pt")
    write_config(tmp_path, "task_arithmetic")
    code = f"import pymerge\npymerge.plan({str(tmp_path / 'merge.yml')!r}, device='cpu')"
    assert "torch" not in modules_after(code)
    assert b"PK" in merge(tmp_path)["colbert_linear.pt"]


def test_folders_that_are_links(tmp_path: Path) -> None:
    """A module's is read as if it were here; of others it is said that they are left out."""
    write_all(tmp_path)
    for name in ("2_Dense", "codec"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/2_Dense").rename(tmp_path / "there")
    (tmp_path / "base/2_Dense").symlink_to(tmp_path / "there")
    save_file({"a": torch.ones(2)}, tmp_path / "codec/model.safetensors")
    (tmp_path / "base/codec").symlink_to(tmp_path / "codec")
    (tmp_path / "base/loop").symlink_to(tmp_path / "base")
    write_config(tmp_path, "task_arithmetic")
    found = merge(tmp_path)
    assert_half_way(tmp_path / "out")
    assert "2_Dense/config.json" in found
    assert not any("codec" in name or "loop" in name for name in found)
    (warning,) = pymerge.plan(tmp_path / "merge.yml", device="cpu").warnings
    assert warning.endswith("beside them, and not used: 'codec'")


def test_slices_copy_modules_of_the_base(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "merge.yml").write_text(
        "merge_method: passthrough\nslices:\n  - sources: [{model: base, layer_range: [0, 1]}]\n"
        "  - sources: [{model: e0, layer_range: [0, 1]}]\n"
    )
    merge(tmp_path)
    for folder, expected in (("2_Dense", dense(6, 6, 8)), ("3_Dense", dense(4, 4, 6))):
        found = load_file(tmp_path / "out" / folder / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
