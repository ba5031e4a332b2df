"""Merges of GGUF models, with each other and with models of transformers: by name, of the values that gguf gives."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from pymerge import api
from tests.helpers.checkpoints import Tensors, fine_tuned, load_output, pymerge, write_model
from tests.helpers.gguf_files import converted, dequantised, gguf_name, grouped_llama, llama_values, write_gguf
from tests.helpers.vocabularies import word_piece

MODELS = ("base", "e0", "e1")


def encoding(name: str, array: NDArray[Any]) -> Type:
    if array.ndim < 2:
        return Type.F32
    return {"attn_v": Type.Q8_0, "attn_k": Type.Q5_1, "ffn_up": Type.BF16}.get(name.split(".")[-2], Type.Q4_0)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, dict[str, Tensors]]:
    """A folder with base, e0 and e1 as x.gguf and as a folder of safetensors, and what the GGUF files hold of each."""
    base = grouped_llama()
    states = {"base": base, "e0": fine_tuned(base, 0, 0.05), "e1": fine_tuned(base, 1, 0.05)}
    held = {}
    for name, state in states.items():
        tensors = converted(state, "llama", blocks=2, heads=4, kv_heads=2)
        write_gguf(tmp_path / f"{name}.gguf", "llama", tensors, llama_values(state, heads=4, kv_heads=2), encoding)
        held[name] = {
            key: torch.from_numpy(dequantised(tensor.numpy(), encoding(gguf_name("llama", key, 2), tensor.numpy())))
            for key, tensor in state.items()
        }
        config = {"model_type": "llama", "tie_word_embeddings": False, "num_attention_heads": 4, "rope_theta": 500000.0}
        config |= {"num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1e-5}
        write_model(tmp_path / name, held[name], config=config, files={"tokenizer.json": "{}"})
    return tmp_path, held


def merged(folder: Path, method: str, base: str, experts: list[str], **more: Any) -> Tensors:
    config = {"merge_method": method, "base_model": base, "models": [{"model": name} for name in experts], **more}
    (folder / "merge.yml").write_text(json.dumps(config))
    out = folder / f"out{len(list(folder.glob('out*')))}"
    api.merge(folder / "merge.yml", out, device="cpu", progress=False)
    return load_output(out)


@pytest.mark.parametrize("experts", [("e0.gguf", "e1.gguf"), ("e0.gguf", "e1"), ("e0", "e1.gguf")])
@pytest.mark.parametrize("base", ["base", "base.gguf"])
def test_a_sum_is_that_of_the_values(
    base: str, experts: tuple[str, str], models: tuple[Path, dict[str, Tensors]]
) -> None:
    folder, held = models
    found = merged(folder, "task_arithmetic", base, list(experts), parameters={"weight": 0.5}, dtype="float32")
    assert found.keys() == held["base"].keys()
    for name, tensor in found.items():
        wanted = held["base"][name].double()
        wanted = wanted + sum(0.5 * (held[expert][name].double() - wanted) for expert in ("e0", "e1"))
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"weight": 0.7, "density": 0.5}),
        ("slerp", {"t": 0.3}),
        ("ace", {}),
        ("della", {"weight": 0.4, "density": 0.5}),
    ],
)
def test_other_methods_make_the_same_of_both(
    method: str, parameters: dict[str, Any], models: tuple[Path, dict[str, Tensors]]
) -> None:
    folder, _ = models
    experts = ["e0"] if method == "slerp" else ["e0", "e1"]
    plain = merged(folder, method, "base", experts, parameters=parameters, dtype="float32")
    of_gguf = merged(
        folder, method, "base.gguf", [f"{name}.gguf" for name in experts], parameters=parameters, dtype="float32"
    )
    assert plain.keys() == of_gguf.keys()
    assert all(torch.equal(plain[name], of_gguf[name]) for name in plain)


def test_dtype_config_and_warnings_of_an_output(models: tuple[Path, dict[str, Tensors]]) -> None:
    folder, held = models
    found = merged(folder, "linear", "base.gguf", ["e0.gguf"], parameters={"weight": 1.0})
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], held["e0"][name].bfloat16()) for name in found)
    config = json.loads((folder / "out0/config.json").read_text())
    assert (config["model_type"], config["head_dim"], config["torch_dtype"]) == ("llama", 16, "bfloat16")
    assert pymerge("verify", folder / "out0", "--deep", "all").code == 0
    assert api.plan(folder / "merge.yml", device="cpu").identity("")["gguf version"] == version("gguf")
    done = pymerge("plan", folder / "merge.yml", "--json")
    assert done.code == 0, done
    made = {row["name"]: row["inputs"][0].get("dequantised") for row in json.loads(done.out)["tensors"]}
    assert made["model.embed_tokens.weight"] == "GGUF Q4_0"
    assert (made["model.norm.weight"], made["model.layers.0.mlp.up_proj.weight"]) == (None, None)
    done = pymerge("plan", folder / "merge.yml")
    said = " ".join(done.out.split())
    assert "dequantised from GGUF: 10 of Q4_0, 2 of Q5_1, 2 of Q8_0" in said
    assert "the output has no tokenizer" in said
    config = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": "e0.gguf"}],
        "parameters": {"weight": 1.0},
    }
    (folder / "merge.yml").write_text(json.dumps(config))
    done = pymerge("plan", folder / "merge.yml")
    assert done.code == 0, done
    assert "tokenizer" not in done.out + done.err  # the base has one


def test_a_config_that_is_in_the_file_is_said_to_be_there(models: tuple[Path, dict[str, Tensors]]) -> None:
    folder, _ = models
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    merged(folder, "linear", "base", ["e0.gguf"], parameters={"weight": 1.0})
    (warning,) = [each for each in api.plan(folder / "merge.yml", device="cpu").warnings if "rope_theta" in each]
    assert f"and 500000.0 in {folder / 'e0.gguf'}; " in warning


def test_a_file_that_changes_is_noticed(models: tuple[Path, dict[str, Tensors]]) -> None:
    folder, _ = models
    merged(folder, "linear", "base.gguf", ["e0.gguf"], parameters={"weight": 1.0})
    content = bytearray((folder / "e0.gguf").read_bytes())
    content[-1] ^= 1
    (folder / "e0.gguf").write_bytes(content)
    done = pymerge("verify", folder / "out0", "--deep", "all")
    assert done.code != 0


def test_tokens_are_matched_where_a_folder_has_a_tokenizer(models: tuple[Path, dict[str, Tensors]]) -> None:
    folder, held = models
    words = [f"w{number}" for number in range(45)]
    word_piece(words).save(str(folder / "base/tokenizer.json"))
    own = folder / "own"
    own.mkdir()
    (folder / "e0.gguf").rename(own / "e0.gguf")
    word_piece(words[::-1]).save(str(own / "tokenizer.json"))
    found = merged(
        folder, "linear", "base", ["base", "own"], parameters={"weight": 0.5}, dtype="float32", tokenizer_source="base"
    )
    order = [0, 1, 2, *range(47, 2, -1)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted = (held["base"][name].double() + held["e0"][name][order].double()) / 2
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-7)
    (folder / "merge.yml").write_text((folder / "merge.yml").read_text().replace('"own"', '"own/e0.gguf"'))
    done = pymerge("plan", folder / "merge.yml")
    assert "own/e0.gguf: has no tokenizer.json; put it into a folder with" in done.errors[0]
