"""Inputs as people have them: formats, 8-bit floats, prefixes, heads, ties, vocabularies. Merged, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import pymerge
from pymerge import api
from pymerge.errors import NonFiniteError, PlanError
from pymerge.planner.plan import Plan
from tests.helpers.checkpoints import (
    CARRIED,
    Tensors,
    change,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    tree,
    write_config,
    write_model,
    write_models,
)

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def to_torch(model: Path, *, wrapped: bool = False) -> None:
    """Write a model's safetensors files again as torch.save would."""
    for file in list(model.glob("*.safetensors")):
        tensors = load_file(file)
        name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save({"state_dict": tensors, "epoch": 1} if wrapped else tensors, model / name)
        file.unlink()
    index = model / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (model / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def merged(folder: Path, out: str = "out", **limits: Any) -> dict[str, bytes]:
    api.merge(folder / "merge.yml", folder / out, device="cpu", progress=False, **limits)
    return tree(folder / out)


def refusal(folder: Path) -> list[str]:
    with pytest.raises(PlanError) as caught:
        api.plan(folder / "merge.yml")
    return caught.value.problems


def warned(plan: Plan, *fragments: object) -> bool:
    return any(all(str(fragment) in warning for fragment in fragments) for warning in plan.warnings)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", ["linear", "wudi"])
def test_files_of_torch_give_the_bytes_that_safetensors_give(method: str, shards: int, tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in llama().items()} | {"model.ids": torch.arange(5)}
    write_models(tmp_path, base, shards=shards, config=llama_config(llama()), files=CARRIED)
    write_config(tmp_path, method, **({"iterations": 3} if method == "wudi" else {}))
    expected = merged(tmp_path, "safetensors", max_shard_size="4KB")
    for model in ("base", "e0", "e1"):
        to_torch(tmp_path / model, wrapped=model == "e1")
    found = merged(tmp_path, "torch", max_shard_size="4KB")
    differing = {name for name in expected if found.get(name) != expected[name]}
    assert found.keys() == expected.keys()
    assert differing <= {"pymerge_manifest.json"}  # it holds the inputs' fingerprint
    assert warned(api.plan(tmp_path / "merge.yml"), tmp_path / "e1", "under 'state_dict'; left out: 'epoch'")


def test_single_files_and_transposed_views(tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base)
    for model in ("base", "e0", "e1"):
        tensors = load_file(tmp_path / model / "model.safetensors")
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors[UP] = tensors[UP].t().contiguous().t()
        torch.save(tensors, tmp_path / f"{model}.pt")
        save_file(expected, tmp_path / f"{model}.safetensors")
    outputs = []
    for suffix in (".pt", ".safetensors"):
        config = {"merge_method": "ace", "base_model": str(tmp_path / f"base{suffix}")}
        config["models"] = [{"model": str(tmp_path / f"e{i}{suffix}")} for i in range(2)]
        pymerge.merge(config, tmp_path / f"out{suffix}", device="cpu", progress=False)
        outputs.append((tmp_path / f"out{suffix}/model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def in_float8(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) if tensor.ndim == 2 else tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
@pytest.mark.parametrize("method", ["task_arithmetic", "wudi_flow"])
def test_8_bit_floats_are_merged_as_the_numbers_they_are(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = llama()
    models = {"base": base, "e0": fine_tuned(base, 0, 0.05), "e1": fine_tuned(base, 1, 0.05)}
    config = llama_config(base, dtype="float8_e4m3fn")
    for name, tensors in models.items():
        small = in_float8(tensors, dtype)
        write_model(tmp_path / "small" / name, small, config=config)
        upcast = {key: tensor.bfloat16() for key, tensor in small.items()}
        write_model(tmp_path / "large" / name, upcast, config=config | {"torch_dtype": "bfloat16"})
    write_config(tmp_path / "small", method)
    write_config(tmp_path / "large", method)
    plan = api.plan(tmp_path / "small/merge.yml")
    assert warned(plan, "16 tensors", UP, "8-bit floats", "written as bfloat16")
    assert {step.dtype for step in plan.steps} == {"BF16"}
    small, large = merged(tmp_path / "small"), merged(tmp_path / "large")
    assert small["config.json"] == large["config.json"]
    found, expected = load_output(tmp_path / "small/out"), load_output(tmp_path / "large/out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert merged(tmp_path / "small", "wide", dtype="float32") != small


def test_experts_in_8_bits_leave_the_dtype_to_the_base(tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    small = in_float8(base, torch.float8_e5m2)
    write_model(tmp_path / "e1", small)
    write_config(tmp_path, "linear")
    plan = api.plan(tmp_path / "merge.yml")
    assert {step.dtype for step in plan.steps} == {"F32"}
    assert not warned(plan, "8-bit")
    merged(tmp_path)
    expected = (load_file(tmp_path / "e0/model.safetensors")[UP] + small[UP].float()) / 2
    torch.testing.assert_close(load_output(tmp_path / "out")[UP], expected, rtol=1e-6, atol=1e-7)
    small[UP].view(torch.uint8)[3, 2] = 0x7F
    save_file(small, tmp_path / "e1/model.safetensors")
    with pytest.raises(NonFiniteError, match=r"up_proj.weight' has 1 values .* first at \[3, 2\]"):
        merged(tmp_path, "broken")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_a_prefix_more_or_less_gives_the_same_merge(prefix: str, tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    write_config(tmp_path, "task_arithmetic")
    expected = merged(tmp_path, "expected")["model.safetensors"]
    expert = load_file(tmp_path / "e1/model.safetensors")
    save_file({prefix + name: tensor for name, tensor in expert.items()}, tmp_path / "e1/model.safetensors")
    plan = api.plan(tmp_path / "merge.yml")
    assert warned(plan, tmp_path / "e1", f"{prefix!r} taken away from its names (21 tensors)")
    assert merged(tmp_path)["model.safetensors"] == expected
    bare = {name.removeprefix("model."): tensor for name, tensor in expert.items()}
    save_file(bare, tmp_path / "e1/model.safetensors")
    assert warned(api.plan(tmp_path / "merge.yml"), "'model.' put before its names (20 tensors)")
    assert merged(tmp_path, "bare")["model.safetensors"] == expected


def test_prefixes_that_do_not_settle_it(tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base)
    write_config(tmp_path, "task_arithmetic")
    two = {f"{part}.{name}": tensor.clone() for part in ("a", "b") for name, tensor in base.items()}
    save_file(two, tmp_path / "e0/model.safetensors")
    part = {f"a.{name}": tensor for name, tensor in base.items() if name != NORM}
    save_file(part, tmp_path / "e1/model.safetensors")
    problems = refusal(tmp_path)
    assert any(": 'a.' taken away from its names, or 'b.' taken away from its names; save" in each for each in problems)
    assert any(each.startswith(f"{tmp_path / 'e1'} lacks 1 tensor: {NORM}; list models") for each in problems)


def test_heads_of_classifiers_are_left_out(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=20)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    for number, labels in enumerate((3, 5)):
        BertForSequenceClassification(BertConfig(**config.to_diff_dict() | {"num_labels": labels})).save_pretrained(
            tmp_path / f"e{number}"
        )
    from transformers import BertModel

    BertModel(config).save_pretrained(tmp_path / "base")
    write_config(tmp_path, "task_arithmetic")
    plan = api.plan(tmp_path / "merge.yml")
    for number in range(2):
        assert warned(plan, tmp_path / f"e{number}", "left out 2 tensors: classifier.bias, classifier.weight")
        assert warned(plan, tmp_path / f"e{number}", "'bert.' taken away from its names")
    merged(tmp_path)
    assert load_output(tmp_path / "out").keys() == load_file(tmp_path / "base/model.safetensors").keys()
    BertModel.from_pretrained(tmp_path / "out")
    write_config(tmp_path, "task_arithmetic", more="extra_tensors: error")
    assert sum("classifier.weight" in problem for problem in refusal(tmp_path)) == 2


def test_other_extra_tensors_are_no_heads(tmp_path: Path) -> None:
    write_models(tmp_path, llama())
    write_model(tmp_path / "e1", fine_tuned(llama(blocks=3), 1))
    write_config(tmp_path, "task_arithmetic")
    assert any("9 tensors" in problem and "extra_tensors: ignore" in problem for problem in refusal(tmp_path))
    write_config(tmp_path, "task_arithmetic", more="extra_tensors: ignore")
    assert warned(api.plan(tmp_path / "merge.yml"), "left out 9 tensors: model.layers.2.")


def test_an_expert_that_ties_its_head_beside_a_base_that_does_not(tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    expert = load_file(tmp_path / "e1/model.safetensors")
    write_config(tmp_path, "linear")
    expert[HEAD] = expert[EMBEDDING].clone()
    save_file(expert, tmp_path / "e1/model.safetensors")
    expected = merged(tmp_path, "expected")["model.safetensors"]
    del expert[HEAD]
    save_file(expert, tmp_path / "e1/model.safetensors")
    assert any("lacks 1 tensor: lm_head.weight" in problem for problem in refusal(tmp_path))
    (tmp_path / "e1/config.json").write_text(json.dumps(llama_config(base, tied=True)))
    assert warned(api.plan(tmp_path / "merge.yml"), tmp_path / "e1", f"{HEAD} is tied there: its {EMBEDDING}")
    assert merged(tmp_path)["model.safetensors"] == expected


def test_a_head_of_its_own_beside_a_tied_base(tmp_path: Path) -> None:
    base = llama(tied=True)
    tied, free = llama_config(base, tied=True), llama_config(base)
    write_models(tmp_path, base, config=tied)
    expert = fine_tuned(base, 1)
    write_config(tmp_path, "linear")
    expected = merged(tmp_path, "expected")["model.safetensors"]
    for config in (tied, free):
        write_model(tmp_path / "e1", expert | {HEAD: expert[EMBEDDING].clone()}, config=config)
        assert api.plan(tmp_path / "merge.yml").warnings == ()
        assert merged(tmp_path, f"tied{config['tie_word_embeddings']}")["model.safetensors"] == expected
    write_model(tmp_path / "e1", expert | {HEAD: expert[EMBEDDING] + 1}, config=tied)
    assert warned(api.plan(tmp_path / "merge.yml"), f"its {HEAD} differs from {EMBEDDING}", "the embedding is used")
    assert merged(tmp_path, "differs")["model.safetensors"] == expected
    write_model(tmp_path / "e1", expert | {HEAD: expert[EMBEDDING] + 1}, config=free)
    assert any("untie the base" in problem and HEAD in problem for problem in refusal(tmp_path))
    write_config(tmp_path, "linear", more="extra_tensors: ignore")
    assert warned(api.plan(tmp_path / "merge.yml"), f"left out 1 tensor: {HEAD}")


def test_shared_storages_are_written_once(tmp_path: Path) -> None:
    config = T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)
    for model in ("base", "e0", "e1"):
        torch.manual_seed(sum(map(ord, model)))
        made = T5ForConditionalGeneration(config)
        made.save_pretrained(tmp_path / model)
        made.save_pretrained(tmp_path / "bin" / model)
        (tmp_path / "bin" / model / "model.safetensors").unlink()
        torch.save(made.state_dict(), tmp_path / "bin" / model / "pytorch_model.bin")
    assert (
        len(torch.load(tmp_path / "bin/base/pytorch_model.bin"))
        == len(made.state_dict())
        > len(load_file(tmp_path / "base/model.safetensors"))
    )
    write_config(tmp_path, "linear")
    write_config(tmp_path / "bin", "linear")
    expected, found = merged(tmp_path), merged(tmp_path / "bin")
    assert found["model.safetensors"] == expected["model.safetensors"]
    write_config(tmp_path, "linear", more="# other")
    (tmp_path / "merge.yml").write_text((tmp_path / "merge.yml").read_text().replace(": base", ": bin/base"))
    assert merged(tmp_path, "mixed")["model.safetensors"] == expected["model.safetensors"]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ace"])
@pytest.mark.parametrize("sizes", [(40, 32, 36), (32, 40, 36), (36, 32, 40)])
def test_vocabularies_of_different_sizes(method: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    whole = llama(vocabulary=40)
    models = {"base": whole, "e0": fine_tuned(whole, 0), "e1": fine_tuned(whole, 1)}

    def cut(tensors: Tensors, rows: int) -> Tensors:
        return {name: t[:rows].clone() if name in (EMBEDDING, HEAD) else t for name, t in tensors.items()}

    for (name, tensors), rows in zip(models.items(), sizes, strict=True):
        shorter = cut(tensors, rows)
        write_model(tmp_path / name, shorter, config=llama_config(shorter))
        shortest = cut(tensors, 32)
        write_model(tmp_path / "cut" / name, shortest, config=llama_config(shortest))
    write_config(tmp_path, method)
    problems = refusal(tmp_path)
    assert len(problems) == 2 * sum(rows != sizes[0] for rows in sizes[1:])
    assert all("set vocabulary: base" in problem for problem in problems)
    write_config(tmp_path, method, more="vocabulary: base")
    write_config(tmp_path / "cut", method)
    plan = api.plan(tmp_path / "merge.yml")
    assert warned(plan, tmp_path / "e0", EMBEDDING, "from row 32 on") or sizes[1] == sizes[0]
    assert plan.tensors == 21
    assert plan.parameters == sum(t.numel() for t in cut(whole, sizes[0]).values())
    merged(tmp_path, max_shard_size="3KB")
    merged(tmp_path / "cut")
    found, common = load_output(tmp_path / "out"), load_output(tmp_path / "cut/out")
    for name, tensor in found.items():
        assert torch.equal(tensor[:32] if name in (EMBEDDING, HEAD) else tensor, common[name])
        if name in (EMBEDDING, HEAD):
            assert torch.equal(tensor[32:], whole[name][32 : sizes[0]])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == len(found[EMBEDDING]) == sizes[0]


@pytest.mark.parametrize("padded", ["base", "e1"])
def test_a_padded_head_over_embeddings_of_one_length(padded: str, tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    rows = torch.cat([load_output(tmp_path / padded)[HEAD], torch.full((8, 16), 7.0)])
    change(tmp_path / padded, lambda tensors: tensors.update({HEAD: rows}))
    write_config(tmp_path, "linear")
    assert all("set vocabulary: base" in problem for problem in refusal(tmp_path))
    write_config(tmp_path, "linear", more="vocabulary: base")
    merged(tmp_path)
    found = load_output(tmp_path / "out")
    mean = (fine_tuned(base, 0)[HEAD] + fine_tuned(base, 1)[HEAD]) / 2
    torch.testing.assert_close(found[HEAD][:32], mean)
    assert torch.equal(found[HEAD][32:], rows[32:] if padded == "base" else rows[:0])


def test_only_tables_of_tokens_may_differ_in_length(tmp_path: Path) -> None:
    base = llama() | {"score.weight": torch.ones(3, 16), "model.embed_positions.weight": torch.ones(64, 16)}
    write_models(tmp_path, base, config=llama_config(base))
    expert = fine_tuned(base, 1)
    expert |= {
        "score.weight": torch.ones(5, 16),
        "model.embed_positions.weight": torch.ones(32, 16),
        UP: torch.ones(9, 16),
    }
    write_model(tmp_path / "e1", expert)
    write_config(tmp_path, "linear", more="vocabulary: base")
    problems = refusal(tmp_path)
    assert len(problems) == 3
    assert all("same architecture and vocabulary" in problem for problem in problems)


def test_a_value_that_is_not_finite_in_the_rows_of_the_base(tmp_path: Path) -> None:
    base = llama(vocabulary=40)
    base[EMBEDDING][37, 5] = float("nan")
    write_models(tmp_path, base)
    expert = fine_tuned(base, 1)
    for name in (EMBEDDING, HEAD):
        expert[name] = expert[name][:32].clone()
    for number in range(2):
        write_model(tmp_path / f"e{number}", expert)
    write_config(tmp_path, "task_arithmetic", more="vocabulary: base")
    with pytest.raises(NonFiniteError, match=r"base/model.safetensors: tensor 'model.embed_tokens.weight' .*\[37, 5\]"):
        merged(tmp_path)
