"""Tiny folders of sentence-transformers on disk: a BERT, pooling, dense layers, in the layouts that there are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pymerge
from tests.helpers.checkpoints import tree

PACKAGE = "sentence_transformers.models"
CONFIG = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1}


def random(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors that are the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def bert(seed: int) -> dict[str, Tensor]:
    """The transformer's tensors."""
    return random(
        seed, {"embeddings.word_embeddings.weight": (20, 8), "encoder.layer.0.attention.self.query.weight": (8, 8)}
    )


def dense(seed: int, rows: int = 6, columns: int = 8) -> dict[str, Tensor]:
    """A Dense module's tensors."""
    return random(100 + seed, {"linear.weight": (rows, columns), "linear.bias": (rows,)})


def put(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], *, bin_file: bool = False) -> Path:
    """One folder with weights and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if bin_file:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_modules(folder: Path, *modules: tuple[str, str]) -> None:
    """modules.json of (class, folder)."""
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"{PACKAGE}.{kind}"}
        for number, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))


def write_sentences(
    folder: Path,
    seed: int,
    *,
    transformer: str = "",
    pooling: Mapping[str, Any] | None = None,
    activation: str = "torch.nn.modules.activation.Tanh",
    bin_file: bool = False,
) -> Path:
    """Transformer, Pooling, two Dense layers, Normalize."""
    put(folder / transformer, bert(seed), CONFIG, bin_file=bin_file)
    write_modules(
        folder,
        ("Transformer", transformer),
        ("Pooling", "1_Pooling"),
        ("Dense", "2_Dense"),
        ("Dense", "3_Dense"),
        ("Normalize", "4_Normalize"),
    )
    (folder / "1_Pooling").mkdir()
    text = json.dumps(pooling or {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True})
    (folder / "1_Pooling/config.json").write_text(text)
    for name, rows, columns in (("2_Dense", 6, 8), ("3_Dense", 4, 6)):
        config = {"in_features": columns, "out_features": rows, "bias": True, "activation_function": activation}
        put(folder / name, dense(seed + rows, rows, columns), config, bin_file=bin_file)
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "cosine"}')
    return folder


def write_all(folder: Path, **settings: Any) -> Path:
    """Write folder/base, folder/e0 and folder/e1."""
    for seed, name in enumerate(("base", "e0", "e1")):
        write_sentences(folder / name, seed, **settings)
    return folder


def merge_all(folder: Path, out: str = "out", **limits: Any) -> dict[str, bytes]:
    """Merge folder/merge.yml; returns the content of every file."""
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
