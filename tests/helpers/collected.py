"""Tiny models of transformers with their tokenizer or image processor, data for them, and the Grams that hooks see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.live_models import FAMILIES

_WORDS = [f"w{number}" for number in range(29)]


def save_tokenizer(folder: Path) -> Any:
    """A tokenizer of words, in a model's folder."""
    import tokenizers
    import transformers

    known = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: at + 3 for at, word in enumerate(_WORDS)}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="</s>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return wrapped


def write_texts(folder: Path, count: int = 7, seed: int = 0) -> list[str]:
    """Texts of several lengths, most of them in one .jsonl file, the last in a .txt file; with targets."""
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(_WORDS, size=3 + number % 4)) for number in range(count)]
    folder.mkdir()
    lines = [json.dumps({"text": text, "target": text.split()[0]}) for text in texts[:-1]]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "b.txt").write_text(texts[-1])
    return texts


def write_images(folder: Path, count: int = 5, seed: int = 0) -> None:
    """Pictures of noise."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def save_vit(folder: Path, seed: int = 0) -> Any:
    """A classifier of pictures with 16 x 16 pixels, and its image processor."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
    model.save_pretrained(folder)
    kind = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(kind))
    return model


def save_model(family: str, folder: Path, seed: int = 0) -> Any:
    """A text model with random weights of a family, and its tokenizer."""
    import transformers

    torch.manual_seed(seed)
    model = FAMILIES[family](transformers).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def write_grams(path: Path, weights: Mapping[str, torch.Tensor]) -> str:
    """A file of Grams of random inputs, for those of the weights that are matrices; of others one of another name."""
    grams = {}
    for name, weight in weights.items():
        inputs = torch.randn(8, weight.shape[-1])
        grams[name if weight.ndim == 2 else f"{name}.other"] = inputs.mT @ inputs / 8
    save_file(grams, path)
    return str(path)


def names_in_files(model: Any, folder: Path) -> dict[str, str]:
    """What the files of a saved model call its weights, by the model's names: those with equal values."""
    stored = load_file(folder / "model.safetensors")
    return {
        own: name
        for own, parameter in model.named_parameters()
        for name, tensor in stored.items()
        if parameter.ndim == 2 and torch.equal(tensor.double(), parameter.double())
    }


def hooked_grams(model: Any, inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Grams in float64 by module, of a model in float64 that is run on inputs one by one."""
    sums: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}
    model = model.double()

    def hook_of(name: str) -> Any:
        def hook(module: Any, given: Any) -> None:
            x = given[0].reshape(-1, given[0].shape[-1])
            sums[name] = sums.get(name, 0) + torch.einsum("ni,nj->ij", x, x)
            rows[name] = rows.get(name, 0) + len(x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(hook_of(name))
    with torch.no_grad():
        for each in inputs:
            model(**{name: x.double() if x.is_floating_point() else x for name, x in each.items()})
    return {f"{name}.weight": total / rows[name] for name, total in sums.items()}
