"""Adapters as models of a merge: how they are named, what is made of them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pymerge import api
from pymerge.analysis.reading import survey
from pymerge.cli.tensor_table import tensor_rows
from pymerge.engine.recheck import recheck
from pymerge.errors import ConfigError, NonFiniteError, OutputError, PlanError
from pymerge.planner.plan import Plan
from tests.helpers.adapters import applied, factors, opened, read_all, write_adapter
from tests.helpers.checkpoints import Tensors, llama, llama_config, tree, write_model
from tests.helpers.quantised import MODELS, quantised_model
from tests.helpers.vocabularies import bpe

MODULES = [f"model.layers.{block}.{name}" for block in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
STEM = "base_model.model."
UP, EMBEDDING, HEAD = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, two adapters of it, and the models that these make of it, as float32 files."""
    tensors = llama(hidden=24, inner=40)
    base = write_model(tmp_path / "base", tensors, config=llama_config(tensors))
    for number in range(2):
        found = factors(tensors, MODULES[number:], rank=3, seed=number)
        adapter = write_adapter(tmp_path / f"a{number}", found, r=3, lora_alpha=6)
        write_model(tmp_path / f"e{number}", read_all(opened(base, adapter)), config=llama_config(tensors))
    return tmp_path


def config(folder: Path, *models: Any, method: str = "task_arithmetic", base: str | None = "base", **more: Any) -> Path:
    said: dict[str, Any] = {"merge_method": method, **({"base_model": base} if base else {}), **more}
    said.setdefault("parameters", {"weight": 0.5})
    said["models"] = [model if isinstance(model, dict) and "model" in model else {"model": model} for model in models]
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(said))
    return path


def planned(path: Path, **limits: Any) -> Plan:
    return api.plan(path, device="cpu", **limits)


def merged(path: Path, out: str = "out", **limits: Any) -> Tensors:
    api.merge(path, path.parent / out, device="cpu", progress=False, overwrite=True, **limits)
    return load_file(path.parent / out / "model.safetensors")


def refusal(path: Path) -> str:
    with pytest.raises((PlanError, ConfigError)) as caught:
        planned(path)
    assert not (path.parent / "out").exists()
    return str(caught.value)


def same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def near(one: Tensors, other: Tensors) -> None:
    """Equal but for the order of sums, in which products of adapters come first."""
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-6, atol=1e-7)


NAMES = {
    "alone": "a0",
    "with its base": "base+a0",
    "as a mapping": {"model": {"model": {"path": "base"}, "lora": {"path": "a0"}}},
    "as a mapping of texts": {"model": {"model": "base", "lora": "a0"}},
    "by its file": "a0/adapter_model.safetensors",
    "by another spelling": "./base+./a0",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_an_adapter_is_the_model_that_it_makes(models: Path, name: str) -> None:
    found = merged(config(models, NAMES[name], "a1", method="ties", parameters={"weight": 1.0, "density": 0.5}))
    same(found, merged(config(models, "e0", "e1", method="ties", parameters={"weight": 1.0, "density": 0.5}), "whole"))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"weight": 1.0, "density": 0.5}),
        ("dare_ties", {"weight": 1.0, "density": 0.5}),
        ("della", {"weight": 1.0, "density": 0.5, "epsilon": 0.1}),
        ("breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
        ("sce", {"select_topk": 0.5}),
        ("model_stock", {}),
        ("karcher", {}),
    ],
)
def test_every_kind_of_method_gives_what_it_gives_of_whole_models(
    models: Path, method: str, parameters: dict[str, float]
) -> None:
    whole = merged(config(models, "e0", "e1", method=method, parameters=parameters), "whole")
    same(merged(config(models, "a0", "a1", method=method, parameters=parameters)), whole)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_sums_of_adapters_are_those_of_whole_models(models: Path, method: str, dtype: str | None) -> None:
    """In float32 as near to float64 as these are, or nearer: the base is added once."""
    more: dict[str, Any] = {"dtype": dtype} if dtype else {}
    parameters = {"weight": 0.3} | ({"density": 1.0} if method == "dare_linear" else {})
    found = merged(config(models, "a0", "a1", method=method, parameters=parameters, **more))
    whole = merged(config(models, "e0", "e1", method=method, parameters=parameters, **more), "whole")
    base = {name: tensor.double() for name, tensor in load_file(models / "base" / "model.safetensors").items()}
    exact = {name: tensor.clone() for name, tensor in base.items()}
    for adapter in ("a0", "a1"):
        tensors = load_file(models / adapter / "adapter_model.safetensors")
        for name, tensor in applied(base, tensors, 2.0).items():
            exact[name] += (0.5 if method == "linear" else 0.3) * (tensor - base[name])
    for name, tensor in exact.items():
        if dtype:
            torch.testing.assert_close(found[name].double(), tensor, rtol=2.0**-8, atol=1e-8)
        else:
            size = tensor.abs().max()
            assert (found[name] - tensor).abs().max() <= 2e-7 * size
            assert (whole[name] - tensor).abs().max() <= 1e-6 * size


def test_a_sum_of_adapters_reads_the_base_once(models: Path) -> None:
    one, two = (planned(config(models, *names)) for names in (["a0"], ["a0", "a1", "a0"]))
    size = (models / "base" / "model.safetensors").stat().st_size
    adapters = 3 * (models / "a0" / "adapter_model.safetensors").stat().st_size
    assert one.bytes_read <= size + adapters
    assert two.bytes_read <= size + 3 * adapters
    row = next(row for row in tensor_rows(two) if row["name"] == UP)
    assert [Path(each["model"]).name for each in row["inputs"]] == ["base", "a0", "a1", "a0"]


def test_one_adapter_with_weight_1_is_the_model_that_it_makes(models: Path) -> None:
    found = merged(config(models, "a0", parameters={"weight": 1.0}))
    for name, tensor in load_file(models / "e0" / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_the_bytes_do_not_depend_on_pieces(models: Path) -> None:
    base = {"x.weight": torch.randn(1500, 512), "y.weight": torch.randn(700, 1030)}
    write_model(models / "large", base)
    write_adapter(models / "b", factors(base, ["x", "y"], rank=5), r=5)
    more: dict[str, Any] = {"base": "large", "parameters": {"weight": 0.5, "lambda": 0.7}}
    path = config(models, "b", "b", **more)
    whole, small = planned(path), planned(path, memory="6MB")
    assert max(len(step.pieces) for step in small.steps) > max(len(step.pieces) for step in whole.steps)
    expected = merged(path)
    same(merged(path, "small", memory="6MB"), expected)


def test_plan_and_output_tell_of_adapters(models: Path) -> None:
    path = config(models, "a0", "base+a1")
    plan = planned(path)
    rows = {row["name"]: row for row in tensor_rows(plan)}
    assert [each.get("adapter") for each in rows[UP]["inputs"]] == [None, "rank 3", "rank 3"]
    assert [Path(each["model"]).name for each in rows[UP]["inputs"]] == ["base", "a0", "a1"]
    assert rows[EMBEDDING]["action"] == "copy"
    whole = planned(config(models, "e0", "e1"))
    assert plan.bytes_read < whole.bytes_read
    api.run(plan, models / "out", progress=False)
    assert "Applied as adapters (LoRA): `a0`, `a1`" in (models / "out" / "README.md").read_text()
    config(models, "a0", "base+a1")
    assert recheck(models / "out").problems == []


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_report_measures_every_adapter(models: Path, method: str) -> None:
    parameters = {"weight": 0.5} | ({"density": 0.5} if method == "ties" else {})
    found = survey(planned(config(models, "a0", "a1", method=method, parameters=parameters)), 1)
    whole = survey(planned(config(models, "e0", "e1", method=method, parameters=parameters)), 1)
    measured = {tensor.name: tensor for tensor in whole.tensors}
    assert {tensor.name for tensor in found.tensors} == {f"{module}.weight" for module in MODULES}
    for tensor in found.tensors:
        assert tensor.dots == measured[tensor.name].dots


def test_peak_memory_hardly_grows_with_the_number_of_adapters(models: Path) -> None:
    one, four = (planned(config(models, *["a0"] * count)) for count in (1, 4))
    pieces = max(40 * 24 * 4 * 4 for _ in one.steps)
    assert four.peak_memory - one.peak_memory <= 4 * pieces + 4 * 3 * 64 * 4 * 4


def test_a_retrained_adapter_is_another_merge(models: Path) -> None:
    path = config(models, "a0", "a1")
    merged(path)
    file = models / "a0" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    with pytest.raises(OutputError, match="overwrite"):
        api.merge(path, models / "out", device="cpu", progress=False)


def test_an_adapter_that_changes_after_planning(models: Path) -> None:
    plan = planned(config(models, "a0"))
    save_file(factors(llama(hidden=24, inner=40), MODULES, seed=9), models / "a0" / "adapter_model.safetensors")
    with pytest.raises(Exception, match=r"adapter_model\.safetensors: has changed since the merge was planned"):
        api.run(plan, models / "out", progress=False)


def test_a_base_of_another_name_is_said(models: Path) -> None:
    file = models / "a0" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/other-bnb-4bit"}))
    assert any(
        "was trained on 'org/other-bnb-4bit', and is applied to" in each
        for each in planned(config(models, "a0")).warnings
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/base"}))
    assert planned(config(models, "a0")).warnings == ()


def test_adapters_of_another_model_than_the_base(models: Path) -> None:
    """The expert is that model with the adapter: everything differs from the base."""
    expected = read_all(opened(models / "e1", models / "a0"))
    found = merged(config(models, "e1+a0", parameters={"weight": 1.0}))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    both = planned(config(models, "base+a0", "e1+a0"))
    assert len({expert.path for expert in both.inputs.experts}) == 2


def test_without_base_model_the_first_adapter_gives_its_own(models: Path) -> None:
    found = merged(config(models, "base+a0", "base+a1", method="linear", base=None))
    near(found, merged(config(models, "e0", "e1", method="linear", base=None), "whole"))
    assert json.loads((models / "out" / "config.json").read_text())["model_type"] == "llama"


def test_an_adapter_in_two_halves_is_the_same_for_sums(models: Path) -> None:
    tensors = load_file(models / "a0" / "adapter_model.safetensors")
    for number, ranks in enumerate((slice(0, 1), slice(1, 3))):
        half = {key: value[ranks] if "lora_A" in key else value[:, ranks] for key, value in tensors.items()}
        rank = half[next(iter(half))].shape[0 if "lora_A" in next(iter(half)) else 1]
        write_adapter(models / f"half{number}", half, r=rank, lora_alpha=2 * rank)
    more: dict[str, Any] = {"parameters": {"weight": 0.7}}
    near(merged(config(models, "half0", "half1", **more)), merged(config(models, "a0", **more), "whole"))


def test_one_adapter_under_two_names_counts_twice(models: Path) -> None:
    plan = planned(config(models, "a0", "base+a0"))
    assert plan.warnings == ("'base+a0' is the same adapter as 'a0': it counts twice",)
    same(merged(models / "merge.yml"), merged(config(models, "a0", "a0"), "twice"))


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "adapters.safetensors"])
def test_adapters_in_other_forms(models: Path, file: str) -> None:
    (models / "other").mkdir()
    save_file({"unet.a.lora.down.weight": torch.ones(2, 2)}, models / "other" / file)
    assert f"in another form than PEFT's ('{file}'); apply it to its model where it was made" in refusal(
        config(models, "other")
    )
    (models / "other" / file).rename(models / "other.safetensors")
    assert "factors of an adapter that is not merged into its weights" in refusal(config(models, "other.safetensors"))


def test_refusals(models: Path) -> None:
    assert "base_model 'a0' is an adapter; name the model that it is for as base_model" in refusal(
        config(models, "a1", base="a0")
    )
    assert "is an adapter" in refusal(config(models, "a1", base="base+a0"))
    assert "'a0' is an adapter, and there is no base_model; add base_model, or write BASE+a0" in refusal(
        config(models, "a0", "e1", method="linear", base=None)
    )
    assert "is a whole model and no adapter; list it for itself" in refusal(config(models, "base+e0"))
    assert "is an adapter; put its model before the +" in refusal(config(models, "a0+a1"))
    assert "model 'a9' not found" in refusal(config(models, "base+a9"))
    assert "with more than one adapter" in refusal(config(models, "base+a0+a1"))


def test_a_folder_with_a_plus_in_its_name(models: Path) -> None:
    (models / "a0").rename(models / "a+0")
    (models / "e1").rename(models / "e+1")
    assert planned(config(models, "a+0", "e+1")).inputs.experts[0].base is not None
    assert planned(config(models, "base+a+0")).inputs.experts[0].path.name == "a+0"


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "wudi"])
def test_nan_names_file_and_factor(models: Path, side: str, method: str) -> None:
    file = models / "a1" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if side in key and "layers.1.mlp.up" in key)
    tensors[key][1, 2] = float("nan")
    save_file(tensors, file)
    parameters = {} if method == "wudi" else {"weight": 0.5}
    with pytest.raises(NonFiniteError) as caught:
        merged(config(models, "a0", "a1", method=method, parameters=parameters))
    assert f"{file}: tensor '{key}' has 1 values that are NaN or infinite, the first at [1, 2]" in str(caught.value)
    assert not (models / "out" / "model.safetensors").exists()


def test_slices_of_adapters(models: Path) -> None:
    def sliced(one: str, other: str) -> dict[str, Any]:
        sources = [[{"model": one, "layer_range": [0, 1]}], [{"model": other, "layer_range": [1, 2]}]]
        return {"merge_method": "passthrough", "base_model": "base", "slices": [{"sources": each} for each in sources]}

    path = models / "merge.yml"
    path.write_text(yaml.safe_dump(sliced("base+a0", "a1")))
    found = merged(path)
    path.write_text(yaml.safe_dump(sliced("e0", "e1")))
    same(found, merged(path, "whole"))


def test_stages_are_bases_of_adapters(models: Path) -> None:
    text = """
name: first
merge_method: linear
models: [{model: base, parameters: {weight: 1}}, {model: e1, parameters: {weight: 1}}]
---
merge_method: task_arithmetic
base_model: first
models: [{model: MODEL, parameters: {weight: 1}}]
"""
    (models / "stages.yml").write_text(text.replace("MODEL", "first+a0"))
    api.multi(models / "stages.yml", models / "one", device="cpu", progress=False)
    (models / "stages.yml").write_text(text.replace("MODEL", "a0"))
    api.multi(models / "stages.yml", models / "two", device="cpu", progress=False)
    found = load_file(models / "one" / "model.safetensors")
    same(found, load_file(models / "two" / "model.safetensors"))
    expected = read_all(opened(models / "one.stages" / "first", models / "a0"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["FP8 blocks", "NF4"])
def test_adapters_of_a_quantised_base(tmp_path: Path, kind: str) -> None:
    form, tensors = MODELS[kind], llama(hidden=64, inner=64)
    found = quantised_model(tensors, form)
    plain, said = llama_config(tensors), {"quantization_config": form.config} if form.config else {}
    write_model(tmp_path / "base", found.stored, config=plain | said)
    write_model(tmp_path / "values", found.values, config=plain)
    write_adapter(tmp_path / "a", factors(tensors, MODULES))
    more = {"parameters": {"weight": 1.0}, "dtype": "float32"}
    same(
        merged(config(tmp_path, "a", **more)),
        merged(config(tmp_path, "a", base="values", **more), "plain"),
    )


class TestTables:
    """Embeddings and heads: tied, resized, with rows of their own."""

    @staticmethod
    def write(folder: Path, tensors: Tensors, *, tied: bool = True, base: Tensors | None = None, **said: Any) -> Path:
        base = base or llama(tied=tied)
        write_model(folder / "base", base, config=llama_config(base, tied=tied))
        write_adapter(folder / "a", {f"{STEM}{name}": tensor for name, tensor in tensors.items()}, **said)
        return config(folder, "a", parameters={"weight": 1.0})

    @staticmethod
    def both() -> Tensors:
        """Factors of embedding and head, as PEFT writes them where it keeps the two tied."""
        a, b = torch.randn(4, 32), torch.randn(16, 4)
        embedding = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
        return embedding | {"lm_head.lora_A.weight": b.T.contiguous(), "lm_head.lora_B.weight": a.T.contiguous()}

    def test_a_tied_table_is_changed_once(self, tmp_path: Path) -> None:
        tensors = self.both()
        found = merged(self.write(tmp_path, tensors))
        a, b = tensors["model.embed_tokens.lora_embedding_A"], tensors["model.embed_tokens.lora_embedding_B"]
        expected = llama(tied=True)[EMBEDDING].double() + 2 * (b.double() @ a.double()).T
        torch.testing.assert_close(found[EMBEDDING].double(), expected, rtol=1e-5, atol=1e-5)

    def test_tied_tables_beside_their_factors(self, tmp_path: Path) -> None:
        tensors, table = self.both(), llama(tied=True)[EMBEDDING]
        plain = merged(self.write(tmp_path / "plain", tensors))
        stored = {f"{module}.base_layer.weight": table.clone() for module in ("model.embed_tokens", "lm_head")}
        path = self.write(tmp_path / "stored", tensors | stored)
        same(merged(path), plain)
        assert planned(path).warnings == ()

    def test_trained_rows_of_a_longer_tied_table(self, tmp_path: Path) -> None:
        """As PEFT writes them where tokens have been added: the longer table beside them, all of it twice."""
        table, rows = torch.randn(34, 16), torch.ones(2, 16)
        tensors = {}
        for module in ("model.embed_tokens", "lm_head"):
            tensors[f"{module}.token_adapter.base_layer.weight"] = table.clone()
            tensors[f"{module}.token_adapter.trainable_tokens_delta"] = rows.clone()
        path = self.write(tmp_path, tensors, trainable_token_indices=[3, 33])
        path.write_text(path.read_text() + "vocabulary: base\n")
        expected = table[:32].clone()
        expected[3] = 1
        torch.testing.assert_close(merged(path)[EMBEDDING], expected)
        tensors["lm_head.token_adapter.trainable_tokens_delta"] += 1
        path = self.write(tmp_path / "other", tensors, trainable_token_indices=[3, 33])
        assert "changes lm_head alone" in refusal(path)

    def test_a_tied_table_that_is_stored_twice(self, tmp_path: Path) -> None:
        base, tensors = llama(), self.both()
        base[HEAD] = base[EMBEDDING].clone()
        twice = merged(self.write(tmp_path / "twice", tensors, base=base))
        del base[HEAD]
        same(twice, merged(self.write(tmp_path / "once", tensors, base=base)))

    def test_tied_tables_that_are_changed_differently(self, tmp_path: Path) -> None:
        tensors = self.both()
        tensors["lm_head.lora_B.weight"][0, 0] += 1
        assert "changes lm_head alone, which" in refusal(self.write(tmp_path, tensors))

    @pytest.mark.parametrize("kept", ["lm_head", "embed_tokens"])
    def test_one_of_two_tied_tables(self, tmp_path: Path, kept: str) -> None:
        tensors = {name: tensor for name, tensor in self.both().items() if kept in name}
        assert "tie_word_embeddings: false" in refusal(self.write(tmp_path, tensors))

    def test_a_tied_table_in_place_of_the_base_s(self, tmp_path: Path) -> None:
        other = {EMBEDDING: torch.ones(32, 16)}
        assert f"changes {EMBEDDING} alone" in refusal(self.write(tmp_path, other))
        kept = merged(self.write(tmp_path, other, ensure_weight_tying=True))[EMBEDDING]
        torch.testing.assert_close(kept, torch.ones(32, 16))
        stored = merged(self.write(tmp_path, other | {HEAD: torch.ones(32, 16)}))[EMBEDDING]
        torch.testing.assert_close(stored, torch.ones(32, 16))

    def test_a_longer_vocabulary(self, tmp_path: Path) -> None:
        tensors = {EMBEDDING: torch.ones(35, 16), HEAD: torch.ones(35, 16)}
        path = self.write(tmp_path, tensors, tied=False)
        assert "vocabularies of different sizes; set vocabulary: base" in refusal(path)
        path.write_text(path.read_text() + "vocabulary: base\n")
        torch.testing.assert_close(merged(path)[EMBEDDING], torch.ones(32, 16))

    def test_the_vocabulary_of_the_adapter_s_tokenizer(self, tmp_path: Path) -> None:
        base, longer = bpe(["ab"]), bpe(["ab"], ["<new>"])
        rows = base.get_vocab_size()
        tables = {EMBEDDING: torch.randn(rows + 1, 16), HEAD: torch.randn(rows + 1, 16)}
        path = self.write(tmp_path, tables, tied=False, base=llama(vocabulary=rows))
        base.save(str(tmp_path / "base" / "tokenizer.json"))
        longer.save(str(tmp_path / "a" / "tokenizer.json"))
        path.write_text(path.read_text() + "tokenizer_source: union\n")
        found = merged(path)
        assert found[EMBEDDING].shape == (rows + 1, 16)
        torch.testing.assert_close(found[EMBEDDING][-1], tables[EMBEDDING][-1])
        assert "<new>" in (tmp_path / "out" / "tokenizer.json").read_text()

    def test_an_adapter_without_tokenizer_has_that_of_its_base(self, tmp_path: Path) -> None:
        base = bpe(["ab"])
        rows = base.get_vocab_size()
        tokens = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 16)}
        path = self.write(tmp_path, tokens, tied=False, base=llama(vocabulary=rows), trainable_token_indices=[2])
        base.save(str(tmp_path / "base" / "tokenizer.json"))
        path.write_text(path.read_text() + "tokenizer_source: base\n")
        torch.testing.assert_close(merged(path)[EMBEDDING][2], torch.ones(16))

    @pytest.mark.parametrize(
        ("indices", "text"),
        [
            ([3], "does not give as many"),
            ([3, 99], r"replaces row 99 of model.embed_tokens.weight, which has 32"),
            (None, "not give"),
        ],
    )
    def test_rows_that_are_not_there(self, tmp_path: Path, indices: list[int] | None, text: str) -> None:
        rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}
        assert text in refusal(self.write(tmp_path, rows, tied=False, trainable_token_indices=indices))

    def test_a_head_that_the_base_has_not(self, tmp_path: Path) -> None:
        found = {f"{STEM}{name}": tensor for name, tensor in {"score.weight": torch.ones(2, 16)}.items()}
        tensors = factors(llama(), MODULES)
        path = self.write(tmp_path, {}, tied=False)
        write_adapter(tmp_path / "a", tensors | found)
        assert any("left out 1 tensor: score.weight" in warning for warning in planned(path).warnings)

    def test_another_tensor_that_the_base_has_not(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, {}, tied=False)
        write_adapter(tmp_path / "a", factors(llama(), MODULES) | {f"{STEM}model.extra.weight": torch.ones(16, 16)})
        assert "model.extra.weight, which" in refusal(path)


@pytest.mark.parametrize("more", [{}, {"extra_tensors": "ignore", "missing_tensors": "base"}], ids=["plain", "ignored"])
@pytest.mark.parametrize("stem", ["", "base_model.model."])
def test_factors_inside_a_model_are_not_left_out(models: Path, stem: str, more: dict[str, str]) -> None:
    """A model that was saved while its adapter was on it."""
    tensors = llama(hidden=24, inner=40)
    found = {key.removeprefix(STEM): tensor for key, tensor in factors(tensors, MODULES).items()}
    wrapped = {f"{stem}{name}": tensor for name, tensor in (tensors | found).items()}
    write_model(models / "wrapped", wrapped, config=llama_config(tensors))
    assert "factors of an adapter that is not merged into its weights" in refusal(config(models, "wrapped", **more))


def test_outputs_hold_nothing_of_the_adapter_s_folder(models: Path) -> None:
    (models / "a0" / "notes.txt").write_text("x")
    merged(config(models, "a0"))
    assert not {"notes.txt", "adapter_config.json", "adapter_model.safetensors"} & tree(models / "out").keys()
