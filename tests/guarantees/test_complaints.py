"""Complaints of users of merging tools: each a case that works here, or is refused before it costs time.

`COVERED` says where the others are tested. Numbers are those of mergekit's issues.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge import api
from pymerge.errors import CheckpointError, ConfigError, PlanError
from tests.helpers.checkpoints import (
    change,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    write_config,
    write_model,
    write_models,
)
from tests.helpers.vocabularies import EMBEDDING, HEAD, bpe, weights, write

TESTS = Path(__file__).resolve().parents[1]
# What was reported -> a test elsewhere that holds it.
COVERED = {
    "memory grows until the machine stops (107, 549)": (
        "guarantees/test_memory.py::test_inputs_ten_times_the_allowed_memory_are_merged"
    ),
    "memory grows with the size of shards (20)": (
        "guarantees/test_memory.py::test_one_large_shard_needs_as_much_as_many_small_ones"
    ),
    "stacked deltas of an embedding do not fit (420)": (
        "methods/test_reduce.py::test_ranges_give_the_bytes_of_the_whole"
    ),
    "vocabularies of different sizes under union (47, 139, 342)": "tokenizers/test_vocabularies.py::test_union",
    "the same, without a tokenizer (47)": "planner/test_inputs.py::test_vocabularies_of_different_sizes",
    "merged tokenizers that cannot be loaded (469)": (
        "tokenizers/test_files.py::test_files_that_would_contradict_are_left_out"
    ),
    "a mis-indented weight is dropped (248)": "config/test_problems.py::test_misindented_weight_is_pointed_at",
    "misspelt keys are ignored": (
        "config/test_problems.py::test_unknown_keys_are_reported_together_with_lines_and_nearest_names"
    ),
    "quantised inputs of every kind (457, 75, 494)": "checkpoint/test_quantised.py::test_by_tensors",
    "an adapter in place of a model (442, 470)": "checkpoint/test_quantised.py::test_an_adapter_is_no_model",
    "names with a prefix more, of a text model in another (434, 576)": (
        "planner/test_inputs.py::test_a_prefix_more_or_less_gives_the_same_merge"
    ),
    "small norms whose trim keeps nothing": "methods/test_ties.py::test_ties_keeps_at_least_one_element",
    "breadcrumbs that drop a whole tensor": (
        "methods/test_ties.py::test_breadcrumbs_that_drop_no_outlier_are_kept_unless_mergekit_is_followed"
    ),
}


@pytest.mark.parametrize("complaint", COVERED)
def test_is_covered(complaint: str) -> None:
    file, _, name = COVERED[complaint].partition("::")
    functions = {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base, e0 and e1."""
    base = llama()
    return write_models(tmp_path, base, config=llama_config(base))


def test_a_misspelt_method_is_found_before_any_model_is_looked_for() -> None:
    """527: after twenty minutes of download. No model of this name is anywhere."""
    text = "merge_method: dare-ties\nbase_model: nobody/nothing\nmodels: [{model: nobody/other}]\n"
    with pytest.raises(ConfigError, match="unknown merge method 'dare-ties'; did you mean 'dare_ties'"):
        api.plan(text)


def test_models_of_different_depths_are_refused_by_the_plan(models: Path) -> None:
    """527, too."""
    deeper = llama(blocks=3)
    write_model(models / "e1", deeper, config=llama_config(deeper))
    change(models / "e0", lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    with pytest.raises(PlanError) as refused:
        api.plan(write_config(models, "task_arithmetic"))
    assert any("e0" in problem and "lacks 9 tensors" in problem for problem in refused.value.problems)
    assert any("e1" in problem and "model.layers.2." in problem for problem in refused.value.problems)
    assert not (models / "out").exists()


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_padded_tables_keep_their_rows_without_any_tokenizer_key(method: str, tmp_path: Path) -> None:
    """425: tables cut from their 152,064 rows to the 151,665 tokens of the tokenizer. Here: 40 rows, fewer tokens."""
    for number, name in enumerate(("base", "e0", "e1")):
        write(tmp_path / name, bpe(["cat", "dog"]), number, rows=40)
    parameters = {"t": 0.5} if method == "slerp" else {"weight": 0.5}
    api.merge(
        write_config(tmp_path, method, experts=1 if method == "slerp" else 2, **parameters),
        tmp_path / "out",
        device="cpu",
        progress=False,
    )
    merged = load_output(tmp_path / "out")
    assert merged[EMBEDDING].shape[0] == merged[HEAD].shape[0] == 40
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 40


def test_the_tokenizer_of_equal_vocabularies_is_the_bases_byte_for_byte(tmp_path: Path) -> None:
    """428: ids out of range for other programs, since the tokenizer had been written anew."""
    for number, name in enumerate(("base", "e0", "e1")):
        write(tmp_path / name, bpe(["cat", "dog"]), number, template="{{ messages }}")
    path = write_config(tmp_path, "linear", more="tokenizer_source: union")
    api.merge(path, tmp_path / "out", device="cpu", progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
def test_a_tied_head_adds_no_parameters(method: str, tmp_path: Path) -> None:
    """385, 632: 9 B became 10 B. One expert stores the head that its config ties, as some programs write it."""
    for number, name in enumerate(("base", "e0", "e1")):
        tensors = weights(24, number, tied=True)
        write_model(tmp_path / name, tensors, config=llama_config(tensors, tied=True))
    change(tmp_path / "e1", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    path = write_config(tmp_path, method, weight=0.5)
    report = api.merge(path, tmp_path / "out", device="cpu", progress=False)
    merged = load_output(tmp_path / "out")
    assert HEAD not in merged
    assert report.parameters == sum(tensor.numel() for tensor in weights(24, 0, tied=True).values())
    assert sum(tensor.numel() for tensor in merged.values()) == report.parameters


def test_a_quantised_expert_is_refused_by_the_plan(models: Path) -> None:
    """482: a broadcast error in the middle of the merge."""
    file = models / "e1/model.safetensors"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.ones(6)
        tensors[f"{name}.quant_map"] = torch.ones(16)

    change(models / "e1", quantise)
    with pytest.raises((CheckpointError, PlanError), match="bitsandbytes") as refused:
        api.plan(write_config(models, "linear"))
    assert str(file.parent) in str(refused.value)


def test_code_templates_and_merges_of_the_base_are_in_the_output(tmp_path: Path) -> None:
    """105, 4: models with code of their own could not be loaded. The code is copied, and not run."""
    files = {
        "modeling_own.py": "raise SystemExit('this was run')\n",
        "configuration_own.py": "raise SystemExit('this was run')\n",
        "chat_template.jinja": "{{ messages }}",
        "merges.txt": "#version: 0.2\nc a\n",
        "vocab.json": '{"c": 0}',
        "preprocessor_config.json": "{}",
    }
    base = llama()
    described = llama_config(base) | {"auto_map": {"AutoModel": "modeling_own.Own"}, "model_type": "own"}
    write_models(tmp_path, base, config=described)
    for name, text in files.items():
        (tmp_path / "base" / name).write_text(text)
    api.merge(write_config(tmp_path, "linear"), tmp_path / "out", device="cpu", progress=False)
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == described["auto_map"]


def test_a_model_of_no_known_architecture(tmp_path: Path) -> None:
    """512, 612, 672: an architecture that nobody has described. Names and shapes are enough."""
    base = {"tower.gate.w": torch.ones(4, 6), "tower.7.experts": torch.ones(3, 4, 6), "scale": torch.ones(())}
    write_models(tmp_path, base, config={"architectures": ["NewestForAnything"], "model_type": "newest"})
    api.merge(write_config(tmp_path, "task_arithmetic"), tmp_path / "out", device="cpu", progress=False)
    merged = load_output(tmp_path / "out")
    for name, tensor in base.items():
        moved = sum(0.5 * (fine_tuned(base, seed)[name].double() - tensor.double()) for seed in (0, 1))
        torch.testing.assert_close(merged[name].double(), tensor + moved, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della", "ties"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_rescaling_in_float16_does_not_overflow(method: str, backend: str) -> None:
    """704: L1 norms beyond 65504, the largest number of float16, gave NaN. Here they are 1e5."""
    base = torch.zeros(1000, 200, dtype=torch.float16)
    expert = torch.full_like(base, 0.5)
    expert[::2] = 0.25
    found = pymerge.merge_tensors(base, [expert], method, density=0.5, rescale=True, backend=backend)
    assert found.dtype == torch.float16
    assert bool(found.isfinite().all())
    # What is kept has the L1 norm of the whole: 75,000, to half a unit of float16 in each element.
    assert float(found.double().abs().sum()) == pytest.approx(75_000, rel=2**-11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arithmetic_is_in_float32_whatever_dtype_says(dtype: str, models: Path) -> None:
    """704, too: half of a small delta is lost where the sum is formed in 16 bits."""
    path = write_config(models, "task_arithmetic", more=f"dtype: {dtype}\nout_dtype: float32")
    api.merge(path, models / "out", device="cpu", progress=False)
    base, first, second, merged = (load_output(models / name) for name in ("base", "e0", "e1", "out"))
    for name, tensor in base.items():
        exact = tensor.double() + 0.5 * (first[name].double() - tensor.double())
        exact = exact + 0.5 * (second[name].double() - tensor.double())
        torch.testing.assert_close(merged[name].double(), exact, rtol=1e-6, atol=1e-8)
