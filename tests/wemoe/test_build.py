"""Directories built from checkpoints on disk against the same models upscaled in memory, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pymerge
from pymerge import wemoe
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import ArgumentError, CheckpointError, ConfigError, NonFiniteError, OutputError, PlanError
from pymerge.output.verify import verify
from pymerge.testing.compare import assert_same

NAMES = ("vit", "clip", "bert", "t5", "llama", "qwen2", "mistral", "gpt2")
STORAGES: dict[str, dict[str, Any]] = {
    "dense": {},
    "pruned": {"kind": "pruned", "ratio": 0.7},
    "low_rank": {"kind": "low_rank", "rank": 3},
    "energy": {"kind": "low_rank", "energy": 0.6, "dtype": "float32"},
}
QUIET: dict[str, Any] = {"progress": False, "device": "cpu"}


def write(folder: Path, model: nn.Module, experts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Save base and experts as transformers does; returns the config of a build of them."""
    clone: Any = copy.deepcopy(model)
    clone.save_pretrained(folder / "base")
    for number, expert in enumerate(experts):
        clone.load_state_dict(expert)
        clone.save_pretrained(folder / f"e{number}")
    models = [{"model": str(folder / f"e{number}")} for number in range(len(experts))]
    return {"base_model": str(folder / "base"), "models": models}


def named(experts: list[dict[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    return {f"e{number}": expert for number, expert in enumerate(experts)}


def tensors_of(out: Path) -> dict[str, Tensor]:
    """The plain checkpoint's."""
    return {name: tensor for file in open_checkpoint(out).files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_build_is_the_upscaled_model(tiny: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    model, inputs, experts = tiny(name)
    config = write(tmp_path, model, experts)
    for kind, storage in STORAGES.items():
        router = {"depth": 1, "shared": True, "layer_code": True} if kind == "pruned" and name != "t5" else {}
        section = {"storage": storage, "router": router, "seed": 5, "init_lambda": 0.25, "reduce": "batch"}
        out = tmp_path / kind
        report = wemoe.build({**config, "wemoe": section}, out, max_shard_size=2000, **QUIET)
        expected = wemoe.upscale(
            model,
            named(experts),
            storage=wemoe.StorageSpec(**storage),
            router=wemoe.RouterSpec(**router),
            seed=5,
            init_lambda=0.25,
            reduce="batch",
        )
        found = wemoe.load(out)
        theirs, ours = expected.state_dict(), found.state_dict()
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            assert_same(key, ours[key], value)
        assert_same("output", found(**inputs)[0], expected(**inputs)[0])
        assert verify(out).problems == []
        written = found.spec.storage
        assert report.spec == found.spec
        files = [load_file(file) for file in out.glob("wemoe-task-vectors-*.safetensors")]
        assert len(files) > 1
        assert written.stored_bytes == sum(tensor.nbytes for file in files for tensor in file.values())
        assert written.dense_bytes == 3 * sum(
            torch.Size(shape).numel() * written.torch_dtype.itemsize
            for module in found.spec.modules
            for shape in module.parameters.values()
        )
        planned = wemoe.plan_build({**config, "wemoe": section}, device="cpu").stored_bytes
        assert planned >= written.stored_bytes if kind in ("energy", "pruned") else planned == written.stored_bytes


def test_with_gates_of_zero_it_is_the_plain_checkpoint(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    import transformers

    model, inputs, experts = tiny("llama")
    config = write(tmp_path, model, experts)
    wemoe.build(config, tmp_path / "out", **QUIET)
    found = wemoe.load(tmp_path / "out")
    with torch.no_grad():
        for parameter in found.routers.parameters():
            parameter.zero_()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    difference = (found(**inputs).logits - plain(**inputs).logits).norm() / plain(**inputs).logits.norm()
    assert float(difference.detach()) < 1e-6


@pytest.mark.parametrize(
    ("method", "parameters"), [("wudi", {"iterations": 3}), ("ace", {}), ("linear", {"weight": 1.0})]
)
def test_the_static_part_is_any_merge_and_mlps_are_the_bases(
    tiny: Callable[[str], Any], tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    model, _, experts = tiny("llama")
    config = {**write(tmp_path, model, experts), "merge_method": method, "parameters": parameters}
    wemoe.build(config, tmp_path / "out", **QUIET)
    pymerge.merge(config, tmp_path / "merged", **QUIET)
    found, merged, base = (tensors_of(tmp_path / name) for name in ("out", "merged", "base"))
    assert found.keys() == merged.keys() == base.keys()
    for name, tensor in found.items():
        assert_same(name, tensor, (base if ".mlp." in name else merged)[name])
        assert ".mlp." in name or not torch.equal(tensor, base[name])


def test_modules_by_pattern_and_other_dtypes(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model, inputs, experts = tiny("llama")
    config = write(tmp_path, model, experts)
    section = {"modules": r"model\.layers\.1\.mlp", "router": {"depth": 0}}
    wemoe.build({**config, "wemoe": section}, tmp_path / "out", dtype="bfloat16", **QUIET)
    found = wemoe.load(tmp_path / "out")
    assert [module.path for module in found.spec.modules] == ["model.layers.1.mlp"]
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    values = load_file(tmp_path / "out/wemoe-task-vectors-00001.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for task, expert in enumerate(experts):  # task vectors are those of the stored float32 weights
        tau = (expert[name] - model.state_dict()[name]).to(torch.bfloat16)
        assert_same(name, values[f"{name}::values"][task], tau)
    assert found(**inputs).logits.dtype == torch.bfloat16


def test_adapted_routers_are_kept_and_verified(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """Routers may change after a build; everything else may not."""
    model, _, experts = tiny("vit")
    config, out = write(tmp_path, model, experts), tmp_path / "out"
    wemoe.build(config, out, **QUIET)
    found = wemoe.load(out)
    with torch.no_grad():
        for parameter in found.routers.parameters():
            parameter += 0.5
    found.save_router(out)
    assert verify(out).problems == []
    assert wemoe.build(config, out, **QUIET).merge.already_done
    for key, value in wemoe.load(out).routers.state_dict().items():
        assert_same(key, value, found.routers.state_dict()[key])
    file = out / "wemoe-router.safetensors"
    routers = load_file(file)
    name = next(iter(routers))
    save_file({**routers, name: torch.full_like(routers[name], torch.nan)}, file)
    assert "values that are NaN or infinite" in verify(out).problems[0]
    save_file({key: value for key, value in routers.items() if key != name}, file)
    assert any(name in problem and "lacks" in problem for problem in verify(out).problems), verify(out)


def test_verify_finds_a_changed_task_vector_and_a_changed_index(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model, _, experts = tiny("vit")
    out = tmp_path / "out"
    wemoe.build(write(tmp_path, model, experts), out, **QUIET)
    file = out / "wemoe-task-vectors-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert any("sha256 is" in problem and file.name in problem for problem in verify(out).problems)
    (out / "wemoe.json").unlink()
    assert any("wemoe.json: is missing" in problem for problem in verify(out).problems)
    index = out / "wemoe-task-vectors.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    assert any("does not agree with the shards" in problem for problem in verify(out).problems)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("  router: {depht: 1}", r"merge.yml:7: unknown key 'depht' in wemoe.router; did you mean 'depth'\?"),
        ("  rooter: {}", r"merge.yml:7: unknown key 'rooter' in wemoe; did you mean 'router'\?"),
        ("  router: {depth: 3}", r"merge.yml:7: wemoe.router.depth is 3; it must be 0, 1 or 2"),
        ("  router: {layer_code: true}", r"merge.yml:7: wemoe.router: layer_code tells a shared router"),
        ("  storage:\n    kind: pruned", r"merge.yml:7: wemoe.storage: storage 'pruned' takes ratio alone"),
        ("  storage:\n    kind: dense\n    stored_bytes: 3", r"merge.yml:9: unknown key 'stored_bytes'"),
        ("  storage: {kind: zip}", r"merge.yml:7: wemoe.storage.kind is 'zip'; it must be 'dense', 'pruned' or"),
        ("  storage: {kind: pruned, ratio: 2}", r"wemoe.storage.ratio is 2; it must be less than or equal to 1"),
        ("  modules: '('", r"merge.yml:7: wemoe.modules is '\('; it must be a regular expression"),
        ("  seed: 1.5", r"merge.yml:7: wemoe.seed is 1.5; it must be a valid integer"),
        ("  init_lambda: much", r"merge.yml:7: wemoe.init_lambda is 'much'"),
        (" 3", r"merge.yml:6: wemoe is 3; write its keys under it"),
    ],
)
def test_a_wrong_section_is_named_with_its_line(tmp_path: Path, section: str, message: str) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(f"base_model: base\nmodels:\n  - model: e0\nmdels: 3\n# the rest\nwemoe:\n{section}\n")
    with pytest.raises(ConfigError, match=message) as error:
        wemoe.plan_build(file)
    assert "merge.yml:4: unknown key 'mdels'; did you mean 'models'?" in str(error.value)  # all at once


def test_what_cannot_be_built_is_refused(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model, _, experts = tiny("llama")
    config, out = write(tmp_path, model, experts), tmp_path / "out"

    def refused(kind: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(kind, match=message):
            wemoe.build({**config, **changes}, out, **QUIET)
        assert not out.exists()

    base, e0 = str(tmp_path / "base"), str(tmp_path / "e0")
    refused(ConfigError, "'base_model' is missing", base_model=None)
    refused(ConfigError, "'base_model' is missing", base_model=None, merge_method="linear", parameters={"weight": 1.0})
    refused(ConfigError, "is listed twice; list each expert once", models=[{"model": e0}, {"model": e0}])
    refused(ConfigError, "models lists only the base; add", models=[{"model": base}])
    refused(ArgumentError, "has no module that 'nothing' matches", wemoe={"modules": "nothing"})
    refused(CheckpointError, "'Nothing' is no model class of transformers", wemoe={"architecture": "Nothing"})
    refused(CheckpointError, "of BertModel is missing; save the base", wemoe={"architecture": "BertModel"})
    with pytest.raises(ConfigError, match="'wemoe' is a section for pymerge wemoe build"):
        pymerge.plan({**config, "merge_method": "ace", "wemoe": {}})
    with pytest.raises(PlanError, match=r"give --memory 12\.75KiB or more"):
        wemoe.build(config, out, memory="2KiB", **QUIET)
    tensors = load_file(tmp_path / "e2/model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    for value, storage, message in (
        (
            torch.nan,
            {},
            rf"e2/model.safetensors: tensor '{name}' has 1 values that are NaN or infinite, the first at \[3, 4\]",
        ),
        (torch.nan, {"kind": "low_rank", "rank": 1}, "values that are NaN or infinite, the first at"),
        (1e5, {"dtype": "float16"}, rf"the task vector of '{name}' has values that float16 cannot hold"),
    ):
        tensors[name][3, 4] = value
        save_file(tensors, tmp_path / "e2/model.safetensors", {"format": "pt"})
        with pytest.raises(NonFiniteError, match=message):
            wemoe.build({**config, "wemoe": {"storage": storage}}, out, max_shard_size=2000, overwrite=True, **QUIET)
        assert not (out / "wemoe.json").exists()
        with pytest.raises(OutputError, match="unfinished"):
            verify(out)
        wemoe.build({**config, "models": config["models"][:1]}, out, overwrite=True, **QUIET)
        assert wemoe.load(out).spec.experts == ["e0"]
        with pytest.raises(OutputError, match=r"holds a finished merge, which differs in: .*wemoe"):
            wemoe.build({**config, "models": config["models"][:1], "wemoe": {"seed": 1}}, out, **QUIET)
        pymerge.merge({**config, "merge_method": "ace", "models": config["models"][:1]}, out, overwrite=True, **QUIET)
        assert not list(out.glob("wemoe*"))


def test_a_checkpoint_without_architecture_names_the_remedy(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model, _, experts = tiny("llama")
    config = write(tmp_path, model, experts)
    file = tmp_path / "base/config.json"
    content = json.loads(file.read_text())
    del content["architectures"]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names no architecture; .* as wemoe\.architecture"):
        wemoe.plan_build(config)
    planned = wemoe.plan_build({**config, "wemoe": {"architecture": "LlamaForCausalLM"}})
    assert len(planned.spec.modules) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "slices: [{sources: [{model: base, layer_range: [0, 1]}, {model: e0, layer_range: [0, 1]}]}]",
            r"merge.yml:2: the layers of a WEMoE are those of its base and experts, and slices put others",
        ),
        ("models: [{model: e0}]\ntokenizer_source: union", r"merge.yml:3: task vectors need tables whose rows agree"),
    ],
)
def test_what_changes_layers_or_rows_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(f"base_model: base\n{lines}\nwemoe: {{}}\n")
    with pytest.raises(ConfigError, match=message):
        wemoe.plan_build(file)
