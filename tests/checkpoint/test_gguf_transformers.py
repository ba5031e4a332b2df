"""GGUF files as transformers has them: it loads what they become, and reads the same values from them itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.reader import Reader
from tests.checkpoint.test_gguf_file import ALL, as_in_practice, write_tiny

# Those that transformers reads, under the names that it saves: experts have others, and the rest it does not know.
READ_BY_TRANSFORMERS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "gpt2"]


def folder_of(tmp_path: Path, architecture: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of transformers with all that a GGUF file becomes, in float32."""
    write_tiny(tmp_path / "x.gguf", architecture, as_in_practice)
    found = open_checkpoint(tmp_path / "x.gguf")
    with Reader(found.stamps) as reader:
        tensors = {name: reader.read(entry).float() for name, entry in found.tensors.items()}
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(found.config | {"torch_dtype": "float32"}))
    return folder, tensors


@pytest.mark.parametrize("architecture", ALL)
def test_transformers_loads_names_shapes_and_config(architecture: str, tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, architecture)
    kind = AutoModel if architecture == "bert" else AutoModelForCausalLM
    model, said = kind.from_pretrained(folder, output_loading_info=True)
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    # Parameters that the tiny file has none of: biases, and what GGUF leaves out.
    assert all(name.endswith(".bias") or name.startswith("pooler.") for name in said["missing_keys"])
    with torch.no_grad():
        assert model(torch.arange(8)[None])[0].isfinite().all()


@pytest.mark.parametrize("architecture", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_values(architecture: str, tmp_path: Path) -> None:
    folder, tensors = folder_of(tmp_path, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = load_gguf_checkpoint(tmp_path / "x.gguf", return_tensors=True, model_to_load=model)["tensors"]
    assert theirs.keys() - {"lm_head.weight"} == tensors.keys() - {"lm_head.weight"}
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name].float(), tensor), name
