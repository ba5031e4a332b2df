"""pymerge as an algorithm of FusionBench; run by tests/integrations/test_fusion_bench.py, with FusionBench installed.

The command is run as a user does, in a folder of its own; what does not depend on it is tried on pools in this process.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import pymerge
from pymerge.errors import ArgumentError, ConfigError
from pymerge.integrations.fusion_bench import Merge
from pymerge.integrations.fusion_bench import merge as merge_module

PLUGIN = Path(pymerge.__file__).parent / "integrations" / "hydra"
NAMES = ("_pretrained_", "math", "code")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()


def llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16, **sizes)
    )


def clip(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    return CLIPVisionModel(CLIPVisionConfig(num_attention_heads=2, **sizes))


def models(make: Any, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """A base and two fine-tuned models on the disk, by the names that the pools have."""
    for number, name in enumerate(NAMES):
        model = make(0)
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(number)
            parameter.data += 0.1 * number * torch.randn(parameter.shape, generator=generator)
        model.to(dtype).save_pretrained(folder / name)
    return {name: str(folder / name) for name in NAMES}


def states(paths: dict[str, str], names: tuple[str, ...] = NAMES) -> list[dict[str, Tensor]]:
    return [load_file(Path(paths[name]) / "model.safetensors") for name in names]


def expected(paths: dict[str, str], method: str, **parameters: Any) -> dict[str, Tensor]:
    base, *experts = states(paths)
    return pymerge.merge_state_dicts(base, experts, method, **parameters)


def same(found: Any, wanted: dict[str, Tensor]) -> None:
    tensors = dict(found.state_dict() if isinstance(found, nn.Module) else found)
    tensors.pop("lm_head.weight", None) if "lm_head.weight" not in wanted else None
    assert tensors.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(tensors[name], wanted[name])] == []


def causal(paths: dict[str, str], *, mapping: bool = False, **more: Any) -> Any:
    entries: dict[str, Any] = dict(paths)
    if mapping:
        target = "transformers.AutoModelForCausalLM" + ("" if more.get("enable_lazy_loading") else ".from_pretrained")
        entries = {k: {"_target_": target, "pretrained_model_name_or_path": path} for k, path in paths.items()}
    return CausalLMPool(OmegaConf.create(entries), tokenizer=None, **more)


def run(where: Path, *arguments: str, plugin: bool = True) -> subprocess.CompletedProcess[str]:
    """`fusion_bench` with these arguments, in a folder."""
    path = [*([str(PLUGIN)] if plugin else []), os.environ["PYTHONPATH"]]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fusion_bench.scripts.cli", *arguments, "fabric.loggers=null", "taskpool=dummy"]
    return subprocess.run(
        command, cwd=where, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def pool_of(kind: str, paths: dict[str, str], where: Path) -> list[str]:
    """A model pool's config in a folder, and the arguments that choose it."""
    config = {"_target_": f"fusion_bench.modelpool.{kind}", "_recursive_": False, "models": paths}
    config |= {"tokenizer": None} if kind == "CausalLMPool" else {"processor": None}
    (where / "configs" / "modelpool").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), where / "configs" / "modelpool" / "tiny.yaml")
    return ["--config-dir", str(where / "configs"), "modelpool=tiny"]


def test_the_command_on_files(tmp_path: Path) -> None:
    paths = models(llama, tmp_path / "models")
    chosen = pool_of("CausalLMPool", paths, tmp_path)
    done = run(
        tmp_path,
        *chosen,
        "method=pymerge/task_arithmetic",
        "method.weights={code: 0.25, math: 0.5}",
        f"method.out_dir={tmp_path}/merged",
        f"merged_model_save_path={tmp_path}/saved",
    )
    assert done.returncode == 0, done.stdout
    wanted = expected(paths, "task_arithmetic", weight=[0.5, 0.25])
    same(load_file(tmp_path / "merged" / "model.safetensors"), wanted)
    same(load_file(tmp_path / "saved" / "model.safetensors"), wanted)
    assert "'model_info'" in done.stdout or "model_info" in done.stdout  # the dummy task pool has seen a model


def test_the_command_on_loaded_models(tmp_path: Path) -> None:
    paths = models(clip, tmp_path / "models")
    chosen = pool_of("CLIPVisionModelPool", paths, tmp_path)
    done = run(tmp_path, *chosen, "method=pymerge/wudi_flow", f"merged_model_save_path={tmp_path}/saved")
    assert done.returncode == 0, done.stdout
    same(load_file(tmp_path / "saved" / "model.safetensors"), expected(paths, "wudi_flow"))


def test_the_command_for_several_methods(tmp_path: Path) -> None:
    """Each merge is left in the folder of its run, and nothing is loaded."""
    paths = models(llama, tmp_path / "models")
    chosen = pool_of("CausalLMPool", paths, tmp_path)
    several = ["method=pymerge/ties,pymerge/linear", "++method.evaluate=false", "hydra.sweep.dir=sweep"]
    done = run(tmp_path, "-m", *chosen, *several)
    assert done.returncode == 0, done.stdout
    assert "No merged model returned" in done.stdout
    same(load_file(tmp_path / "sweep" / "0" / "merged" / "model.safetensors"), expected(paths, "ties"))
    same(load_file(tmp_path / "sweep" / "1" / "merged" / "model.safetensors"), expected(paths, "linear"))


def test_the_plugin_is_what_finds_the_configs(tmp_path: Path) -> None:
    done = run(tmp_path, "method=pymerge/ties", "dry_run=true", plugin=False)
    assert done.returncode != 0
    assert "Could not find 'method/pymerge/ties'" in done.stdout
    found = run(tmp_path, "--cfg", "job", "--package", "method", "method=pymerge/ties")
    assert found.returncode == 0, found.stdout
    assert "pymerge.integrations.fusion_bench.Merge" in found.stdout


@pytest.mark.parametrize("mapping", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("stream", [True, False])
def test_pools_of_language_models(tmp_path: Path, mapping: bool, lazy: bool, stream: bool) -> None:
    paths = models(llama, tmp_path)
    pool = causal(paths, mapping=mapping, enable_lazy_loading=lazy)
    before = OmegaConf.to_container(pool._models)
    parameters = OmegaConf.create({"density": {"code": 0.5, "math": 0.75}, "scope": "tensor"})
    merge = Merge("ties", parameters, weights=[1.0, 0.5], stream=stream, out_dir=str(tmp_path / "out"))
    merged = merge.run(pool)
    assert isinstance(merged, LlamaForCausalLM)
    same(merged, expected(paths, "ties", density=[0.75, 0.5], weight=[1.0, 0.5]))
    assert (tmp_path / "out").exists() is stream
    assert OmegaConf.to_container(pool._models) == before
    same(merge.run(pool), dict(merged.state_dict()))


def test_a_dtype_that_differs_is_merged_in_memory(tmp_path: Path) -> None:
    paths = models(llama, tmp_path)
    pool = causal(paths, model_kwargs=OmegaConf.create({"torch_dtype": "bfloat16"}))
    merged = Merge("task_arithmetic", {"lambda": 0.5}, out_dir=str(tmp_path / "out")).run(pool)
    assert not (tmp_path / "out").exists()
    base, *experts = ({key: each.bfloat16() for key, each in state.items()} for state in states(paths))
    same(merged, pymerge.merge_state_dicts(base, experts, "task_arithmetic", lambda_=0.5))
    same16 = models(llama, tmp_path / "16", torch.bfloat16)
    pool = causal(same16, model_kwargs=OmegaConf.create({"torch_dtype": "bfloat16"}))
    same(Merge("ties", out_dir=str(tmp_path / "out")).run(pool), expected(same16, "ties"))
    assert (tmp_path / "out").exists()


def test_modules_in_a_pool_stay_as_they_are() -> None:
    found = {name: llama(number) for number, name in enumerate(NAMES)}
    before = copy.deepcopy(found)
    merged = Merge("ace").run(BaseModelPool(found))
    base, *experts = (dict(model.state_dict()) for model in before.values())
    wanted = pymerge.merge_state_dicts(base, experts, "ace")
    assert merged is not found["_pretrained_"]
    same(merged, wanted)
    for name, model in found.items():
        same(model, dict(before[name].state_dict()))


def test_memory_bounds_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = models(llama, tmp_path)
    size = sum(tensor.nbytes for tensor in states(paths)[0].values())
    wanted = expected(paths, "ties")
    same(Merge("ties", stream=False, memory=3 * size).run(causal(paths)), wanted)
    loaded: list[str] = []
    load = merge_module.load
    monkeypatch.setattr(merge_module, "load", lambda pool, name, *path: loaded.append(name) or load(pool, name, *path))
    with pytest.raises(ArgumentError, match=rf"holds 3 models .* give memory: {3 * size} or more, .* stream: true"):
        Merge("ties", stream=False, memory=3 * size - 1).run(causal(paths))
    assert loaded == ["_pretrained_"]  # and no other
    same(Merge("ties", stream=True, memory="1MiB", out_dir=str(tmp_path / "out")).run(causal(paths)), wanted)


def test_without_a_base(tmp_path: Path) -> None:
    paths = models(llama, tmp_path)
    two = {name: paths[name] for name in NAMES[1:]}
    one, other = states(two, NAMES[1:])
    for stream in (True, False):
        merged = Merge("linear", stream=stream, out_dir=str(tmp_path / "out")).run(causal(two))
        found = dict(merged.state_dict())
        for name, tensor in one.items():
            torch.testing.assert_close(found[name], (tensor + other[name]) / 2)
    with pytest.raises(ArgumentError, match="name it _pretrained_"):
        Merge("ties").run(causal(two))


def test_only_target_modules_are_merged() -> None:
    found = {name: clip(number) for number, name in enumerate(NAMES)}
    for model in found.values():
        model._fusion_bench_target_modules = ["encoder"] if hasattr(model, "encoder") else ["vision_model.encoder"]
    merged = Merge("task_arithmetic", {"lambda": 0.5}).run(BaseModelPool(found))
    base = dict(found["_pretrained_"].state_dict())
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed
    assert all("encoder" in name for name in changed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"merge_method": "tise"}, ConfigError, "did you mean 'ties'"),
        ({"parameters": {"densty": 0.5}}, (ArgumentError, ConfigError), "did you mean 'density'"),
        ({"weights": {"maths": 1.0, "code": 1.0}}, ArgumentError, "did you mean 'math'"),
        ({"weights": {"code": 1.0}}, ArgumentError, "no value for math"),
        ({"weights": [1.0]}, ArgumentError, "1 values for 2 models"),
        ({"merge_method": "wudi", "weights": 1.0}, ArgumentError, "no weights; delete"),
        ({"stream": "yes"}, ArgumentError, "auto, true or false"),
        ({"evaluate": False, "stream": False}, ArgumentError, "set stream: true"),
        ({"out_dir": None, "stream": True}, ArgumentError, "set out_dir"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_bad_arguments(tmp_path: Path, stream: bool, arguments: dict[str, Any], error: Any, message: str) -> None:
    paths = models(llama, tmp_path)
    given = {"merge_method": "ties", "out_dir": str(tmp_path / "out"), "stream": stream, **arguments}
    with pytest.raises(error, match=message):
        Merge(**given).run(causal(paths))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_streamed_says_why(tmp_path: Path) -> None:
    found = {name: llama(number) for number, name in enumerate(NAMES)}
    with pytest.raises(ArgumentError, match=r"BaseModelPool loads other tensors.*stream: false"):
        Merge("ties", stream=True).run(BaseModelPool(found))
    paths = models(llama, tmp_path)
    entry = {"_target_": "transformers.AutoModelForCausalLM.from_pretrained", "num_hidden_layers": 1}
    entries = {name: {**entry, "pretrained_model_name_or_path": path} for name, path in paths.items()}
    with pytest.raises(ArgumentError, match="loaded with num_hidden_layers"):
        Merge("ties", stream=True).run(CausalLMPool(OmegaConf.create(entries), tokenizer=None))
