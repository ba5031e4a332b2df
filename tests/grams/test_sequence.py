"""regmean_pp against a loop over whole models in float64: each block on inputs from the merged blocks before it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import pymerge
from pymerge.cli.main import app
from pymerge.engine.recheck import recheck
from pymerge.errors import ArgumentError, CheckpointError, ConfigError, OutputError, PlanError
from pymerge.grams import sequence
from pymerge.grams.turns import Passage
from tests.helpers.collected import names_in_files, save_model, save_tokenizer, save_vit, write_images, write_texts

pytest.importorskip("transformers")
# Where each family has its blocks, in the order in which they run.
BLOCKS = {
    "llama": ["model.layers"],
    "gpt2": ["transformer.h"],
    "bert": ["bert.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
    "vit": ["vit.encoder.layer"],
}
Inputs = list[dict[str, torch.Tensor]]


def blocks_of(model: Any, family: str) -> list[tuple[str, Any]]:
    found = []
    for path in BLOCKS[family]:
        try:
            members = model.get_submodule(path)
        except AttributeError:  # ViT's has had two names
            path = "vit.layers"
            members = model.get_submodule(path)
        found += [(f"{path}.{number}", member) for number, member in enumerate(members)]
    return found


def linears(module: Any) -> dict[str, Any]:
    return {
        name: each
        for name, each in module.named_modules()
        if isinstance(each, torch.nn.Linear) or type(each).__name__ == "Conv1D"
    }


def calls_of(model: Any, block: Any, inputs: Inputs) -> list[tuple[Any, Any]]:
    """What a block of a model is called with, for each input."""
    calls = []
    hook = block.register_forward_pre_hook(lambda _, given, named: calls.append((given, named)), with_kwargs=True)
    for each in inputs:
        model(**each)
    hook.remove()
    return calls


def grams_of(block: Any, calls: list[tuple[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Means of x x^T over the inputs of the block's linear layers."""
    rows: dict[str, list[Any]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, name=name: rows.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))
        )
        for name, layer in linears(block).items()
    ]
    for given, named in calls:
        block(*copy.deepcopy(given), **copy.deepcopy(named))
    for hook in hooks:
        hook.remove()
    stacked = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
    return {name: x.T @ x / len(x) for name, x in stacked.items()}


@torch.no_grad()
def oracle(base: Any, experts: list[Any], data: list[Inputs], family: str, ratio: float) -> Any:
    """The published loop: everything outside the blocks averaged, then one block after the other."""
    models = [copy.deepcopy(each).double().eval() for each in (base, *experts)]
    for model in models:
        for module in model.modules():
            if getattr(getattr(module, "config", None), "use_cache", None):
                module.config.use_cache = False
    merged, *experts = models
    own = [dict(each.named_parameters()) for each in experts]
    for name, parameter in merged.named_parameters():
        parameter.copy_(torch.stack([each[name] for each in own]).mean(0))
    each_blocks = [blocks_of(each, family) for each in experts]
    for number, (_, block) in enumerate(blocks_of(merged, family)):
        theirs = [blocks[number][1] for blocks in each_blocks]
        pairs = zip(theirs, data, strict=True)
        grams = [grams_of(their, calls_of(merged, block, inputs)) for their, inputs in pairs]
        for name, layer in linears(block).items():
            reduced = [ratio * each[name] + (1 - ratio) * np.diag(np.diag(each[name])) for each in grams]
            weights = [linears(their)[name].weight.numpy() for their in theirs]
            transposed = not isinstance(layer, torch.nn.Linear)
            right = sum(G @ (W if transposed else W.T) for G, W in zip(reduced, weights, strict=True))
            mean = np.mean([W if transposed else W.T for W in weights], axis=0)
            # The solution nearest to the mean, where inputs leave it open.
            S = sum(reduced)
            found = mean + np.linalg.pinv(S, rcond=1e-13, hermitian=True) @ (right - S @ mean)
            layer.weight.copy_(torch.from_numpy(found if transposed else found.T))
    return merged


def case(folder: Path, family: str) -> tuple[Any, list[Any], list[Inputs], dict[str, Any]]:
    """A base and two experts in float64, their data as inputs, and the config."""
    models = []
    for seed, name in enumerate(("base", "one", "two")):
        model = save_vit(folder / name, seed) if family == "vit" else save_model(family, folder / name, seed)
        models.append(model.double())
        model.save_pretrained(folder / name)
    data: list[Inputs] = []
    for number, name in enumerate(("data one", "data two")):
        if family == "vit":
            data.append(image_inputs(folder, name, 3 + number))
        else:
            data.append(text_inputs(folder, name, 5 + number, family == "t5"))
    entries = [{"model": name, "parameters": {"data": f"data {name}"}} for name in ("one", "two")]
    config = {"merge_method": "regmean_pp", "base_model": "base", "models": entries, "parameters": {"batch": 2}}
    (folder / "merge.yml").write_text(json.dumps(config))
    return models[0], models[1:], data, config


def text_inputs(folder: Path, name: str, count: int, targets: bool) -> Inputs:
    texts = write_texts(folder / name, count, seed=count)
    if targets:
        (folder / name / "b.txt").unlink()
        texts = texts[:-1]
    tokenizer = save_tokenizer(folder / "tokenizer")

    def ids(text: str) -> torch.Tensor:
        return torch.tensor([tokenizer(text)["input_ids"]])

    return [{"input_ids": ids(text)} | ({"labels": ids(text.split()[0])} if targets else {}) for text in texts]


def image_inputs(folder: Path, name: str, count: int) -> Inputs:
    import transformers
    from PIL import Image

    write_images(folder / name, count, seed=count)
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "base")
    pictures = [Image.open(path) for path in sorted((folder / name).iterdir())]
    return [{"pixel_values": processor(images=each, return_tensors="pt")["pixel_values"].double()} for each in pictures]


def write_config(folder: Path, config: dict[str, Any], **parameters: Any) -> Path:
    path = folder / "merge.yml"
    path.write_text(json.dumps(config | {"parameters": {**config["parameters"], **parameters}}))
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_it_is_the_loop_over_whole_models(tmp_path: Path, family: str, ratio: float) -> None:
    base, experts, data, config = case(tmp_path, family)
    expected = dict(oracle(base, experts, data, family, ratio).named_parameters())
    path = write_config(tmp_path, config, reduce_non_diagonal_ratio=ratio)
    pymerge.merge(path, tmp_path / "out", device="cpu", progress=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    names = names_in_files(base, tmp_path / "base")
    compared = 0
    for own, parameter in expected.items():
        if (name := names.get(own)) in found:
            torch.testing.assert_close(
                found[name], parameter, rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )
            compared += 1
    assert compared >= {"llama": 14, "gpt2": 8, "bert": 12, "t5": 30, "vit": 12}[family]
    assert not (tmp_path / "out" / ".pymerge").exists()


def test_inputs_of_the_merged_model_are_not_those_of_the_experts(tmp_path: Path) -> None:
    """The second block differs from regmean's, the first does not: there the averaged embeddings are no expert's."""
    from pymerge.grams.collect import Settings, collect

    _, _, _, config = case(tmp_path, "llama")
    pymerge.merge(write_config(tmp_path, config), tmp_path / "out", device="cpu", progress=False)
    for name in ("one", "two"):
        file = tmp_path / f"{name}.safetensors"
        collect(
            str(tmp_path / name),
            tmp_path / f"data {name}",
            file,
            Settings(256, None, 512, 2, "float64", ()),
            progress=False,
        )
    entries = [{"model": name, "parameters": {"grams": f"{name}.safetensors"}} for name in ("one", "two")]
    path = tmp_path / "regmean.yml"
    path.write_text(json.dumps({"merge_method": "regmean", "base_model": "base", "models": entries}))
    pymerge.merge(path, tmp_path / "regmean", device="cpu", progress=False)
    ours, other = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "regmean"))
    differs = {name: not torch.allclose(tensor, other[name], rtol=1e-4) for name, tensor in ours.items()}
    assert {name for name, each in differs.items() if each} == {name for name in ours if "proj" in name}


def test_what_was_interrupted_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, config = case(tmp_path, "llama")
    path = write_config(tmp_path, config)
    pymerge.merge(path, tmp_path / "straight", device="cpu", progress=False)
    kept, tried = sequence._Sequence._write, Passage.try_out
    calls: list[Any] = []

    def stop_at_the_third(self: Any, *rest: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rest)
        kept(self, *rest)

    monkeypatch.setattr(sequence._Sequence, "_write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pymerge.merge(path, tmp_path / "out", device="cpu", progress=False)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(sequence._Sequence, "_write", kept)
    later: list[Any] = []
    monkeypatch.setattr(Passage, "try_out", lambda self, *rest: (later.append(rest), tried(self, *rest)))
    pymerge.merge(path, tmp_path / "out", device="cpu", progress=False)
    assert len(later) == 2  # the experts on the second of two blocks
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "straight/model.safetensors").read_bytes()
    with pytest.raises(OutputError, match=r"was merged by regmean_pp.*without --deep"):
        recheck(tmp_path / "out")


def test_no_more_than_one_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, config = case(tmp_path, "gpt2")
    most: list[int] = []
    tried = Passage.try_out

    def watched(self: Passage, *rest: Any) -> None:
        (stack,) = [each for each in self._owner.modules() if isinstance(each, torch.nn.ModuleList)]
        most.append(sum(not next(block.parameters()).is_meta for block in stack))
        tried(self, *rest)

    opened = sequence.network_of

    def remembered(*arguments: Any) -> Any:
        found = opened(*arguments)
        Passage._owner = found.opened.model
        return found

    monkeypatch.setattr(Passage, "try_out", watched)
    monkeypatch.setattr(sequence, "network_of", remembered)
    monkeypatch.setattr(Passage, "_owner", None, raising=False)
    pymerge.merge(write_config(tmp_path, config), tmp_path / "out", device="cpu", progress=False)
    assert most == [1] * 4


def test_weights_without_inputs_are_averaged_and_told(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    known = transformers.OPTConfig(**sizes, word_embed_proj_dim=8, max_position_embeddings=32)
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        transformers.OPTForCausalLM(known).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    for name in ("one", "two"):
        write_texts(tmp_path / f"data {name}")
    entries = [{"model": name, "parameters": {"data": f"data {name}"}} for name in ("one", "two")]
    path = tmp_path / "merge.yml"
    path.write_text(json.dumps({"merge_method": "regmean_pp", "base_model": "base", "models": entries}))
    plan = pymerge.plan(path, device="cpu")
    (warning,) = [each for each in plan.warnings if "averaged" in each]
    assert "project_in" in warning
    assert "no block of the network" in warning
    shown = CliRunner().invoke(app, ["plan", str(path)]).output
    assert re.search(r"data    \S*data one, the first 256 samples", shown.replace("\n", ""))
    pymerge.run(plan, tmp_path / "out", progress=False)
    each = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "out")]
    name = next(name for name in each[2] if "project_in" in name)
    torch.testing.assert_close(each[2][name], (each[0][name] + each[1][name]) / 2)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    _, _, _, config = case(tmp_path, "llama")
    path = write_config(tmp_path, config)

    def plan(**keys: Any) -> None:
        path.write_text(json.dumps(config | keys))
        pymerge.plan(path, device="cpu")

    (tmp_path / "empty").mkdir()
    for data, wrong in (("nowhere", r"data: no folder .*nowhere"), ("empty", "holds no text and no image")):
        entries = [config["models"][0], {"model": "two", "parameters": {"data": data}}]
        with pytest.raises(CheckpointError, match=wrong):
            plan(models=entries)
    with pytest.raises(ConfigError, match="has no 'data', which 'regmean_pp' requires"):
        plan(models=[config["models"][0], {"model": "two"}])
    with pytest.raises(PlanError, match=r"layer_scale: \{power: p\} needs the norms of all layers"):
        plan(parameters={"layer_scale": {"power": 2}})
    path.write_text(json.dumps(config))
    ready = pymerge.plan(path, device="cpu")
    with pytest.raises(PlanError, match="merge it by one process"):
        pymerge.run(ready, tmp_path / "out", part=(1, 2), progress=False)
    assert {file.parent.name for file in ready.inputs.grams} == {"data one", "data two"}
    (tmp_path / "data one" / "b.txt").write_text("w1 w2 w3")
    with pytest.raises(CheckpointError, match=r"b\.txt: has changed since the merge was planned"):
        pymerge.run(ready, tmp_path / "out", progress=False)
    with pytest.raises(ArgumentError, match="which needs their files; merge them with pymerge merge"):
        pymerge.merge_tensors(torch.eye(2), [torch.eye(2)], "regmean_pp", data=["data one"])
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "one")]
    with pytest.raises(ArgumentError, match="which needs their files; merge them with pymerge merge"):
        pymerge.Merger(states[0], states[1:], "regmean_pp", data=["data one"], device="cpu")
    (tmp_path / "stages.yml").write_text(json.dumps(config | {"name": "first"}) + "\n---\n" + json.dumps(config))
    with pytest.raises(PlanError, match="of a config by itself"):
        pymerge.multi(tmp_path / "stages.yml", tmp_path / "out", device="cpu", progress=False)
    found = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(found | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(CheckpointError, match="'NoSuchModel', no model class"):
        pymerge.plan(path, device="cpu")
    assert not (tmp_path / "out").exists()
