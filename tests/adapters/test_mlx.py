"""Adapters of mlx-lm: factors stored transposed, one scale, stacks of experts; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge.errors import CheckpointError
from tests.adapters.test_experts import numbered, stacked
from tests.helpers.adapters import Tensors, opened, read_all
from tests.helpers.checkpoints import write_model

WRITTEN = Path(__file__).parent / "written" / "mlx"
Q = "model.layers.1.self_attn.q_proj"
EXPERTS = "model.layers.0.block_sparse_moe.switch_mlp"


def write(folder: Path, tensors: Tensors, **said: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.5}, **said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tensors() -> Tensors:
    return load_file(WRITTEN / "llama-lora" / "adapters.safetensors")


def test_the_base_that_it_names_is_said(tensors: Tensors, tmp_path: Path) -> None:
    (note,) = opened(WRITTEN / "llama", write(tmp_path / "a", tensors, model="mlx-community/Other-4bit")).notes
    assert "was trained on 'mlx-community/Other-4bit', and is applied to" in note


def test_whole_tensors_are_those_of_a_model_of_mlx(tmp_path: Path) -> None:
    """Files of mlx may hold a tensor otherwise, under the same name."""
    whole = load_file(WRITTEN / "llama" / "model.safetensors")
    trained = {f"{Q}.weight": torch.ones(16, 16), "model.layers.1.input_layernorm.weight": torch.zeros(16)}
    adapter = write(tmp_path / "a", trained, fine_tune_type="full", lora_parameters=None)
    with pytest.raises(CheckpointError, match=r"fine_tune_type is full: .*llama is none; convert the base \(mlx_lm"):
        opened(WRITTEN / "llama", adapter)
    base = write_model(tmp_path / "base", whole)
    save_file(whole, base / "model.safetensors", metadata={"format": "mlx"})
    found = read_all(opened(base, adapter))
    assert all(torch.equal(found[name], (whole | trained)[name]) for name in whole)


def switched(seed: int = 3) -> Tensors:
    """Factors of all experts of `numbered`, as mlx-lm has them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for word, rows, columns in (("gate_proj", 10, 6), ("up_proj", 10, 6), ("down_proj", 6, 10)):
        found[f"{EXPERTS}.{word}.lora_a"] = torch.randn(3, 2, columns, generator=generator)
        found[f"{EXPERTS}.{word}.lora_b"] = torch.randn(3, rows, 2, generator=generator)
    return found


def expected(factors: Tensors) -> Tensors:
    """What they make of `numbered`, in float64."""
    found = {}
    for name, tensor in numbered().items():
        number, word = name.split(".")[5:7]
        stem = f"{EXPERTS}.{ {'w1': 'gate_proj', 'w3': 'up_proj', 'w2': 'down_proj'}[word] }"
        a, b = (factors[f"{stem}.lora_{side}"][int(number)].double() for side in "ab")
        found[name] = tensor.double() + 2.5 * b @ a
    return found


def mlx_stack(files: Tensors) -> Tensors:
    """The experts as mlx itself writes them."""
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    stem = EXPERTS.replace("switch_mlp", "experts")
    return {
        f"{EXPERTS}.{word}.weight": torch.stack([files[f"{stem}.{e}.{short}.weight"] for e in range(3)])
        for word, short in words.items()
    }


@pytest.mark.parametrize("form", [lambda files: files, stacked, mlx_stack], ids=["numbered", "transformers", "mlx"])
def test_experts_in_every_form_of_the_base(form: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    factors = switched()
    base = write_model(tmp_path / "base", form(numbered()))
    found = read_all(opened(base, write(tmp_path / "a", factors)))
    for name, tensor in form(expected(factors)).items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-5)


def other_count(found: Tensors) -> None:
    for key in found:
        found[key] = found[key][:2]


def other_size(found: Tensors) -> None:
    found[f"{EXPERTS}.up_proj.lora_b"] = torch.ones(3, 9, 2)


@pytest.mark.parametrize("edit", [other_count, other_size])
@pytest.mark.parametrize("form", [lambda files: files, stacked, mlx_stack], ids=["numbered", "transformers", "mlx"])
def test_experts_of_another_model(
    form: Callable[[Tensors], Tensors], edit: Callable[[Tensors], None], tmp_path: Path
) -> None:
    edit(factors := switched())
    with pytest.raises(
        CheckpointError, match=r"the factors of model\.layers\.0\.block_sparse_moe\.switch_mlp\.\w+ \(A"
    ):
        opened(write_model(tmp_path / "base", form(numbered())), write(tmp_path / "a", factors))


def lone(found: Tensors) -> None:
    del found[f"{Q}.lora_b"]


def unknown(found: Tensors) -> None:
    found[f"{Q}.lora_c"] = torch.ones(2)


def whole(found: Tensors) -> None:
    found[f"{Q}.weight"] = torch.ones(16, 16)


def ranks(found: Tensors) -> None:
    found[f"{Q}.lora_b"] = torch.ones(4, 16)


def elsewhere(found: Tensors) -> None:
    found |= {key.replace("layers.1", "layers.7"): value.clone() for key, value in found.items()}


def lengths(found: Tensors) -> None:
    found[f"{Q}.m"] = torch.ones(16)


FUSE = "mlx_lm.fuse --model BASE --adapter-path"
REFUSED: dict[str, tuple[Callable[[Tensors], None], dict[str, Any], tuple[str, ...]]] = {
    "a factor alone": (lone, {}, (f"no lora_b of {Q}", "copy the adapter again")),
    "a name of nobody": (unknown, {}, (f"tensor '{Q}.lora_c' has no name that mlx-lm gives", FUSE)),
    "whole tensors among factors": (whole, {}, (f"tensor '{Q}.weight' has no name that mlx-lm gives",)),
    "ranks that differ": (ranks, {}, (f"{Q} have ranks 3 and 4",)),
    "another model": (elsewhere, {}, ("adapts 'model.layers.7", FUSE)),
    "lengths without DoRA": (lengths, {}, (f"has a lora_magnitude_vector of {Q}", "use_dora: false")),
    "DoRA without lengths": (lambda found: None, {"fine_tune_type": "dora"}, ("has no lora_magnitude_vector of",)),
    "another type": (lambda found: None, {"fine_tune_type": "ia3"}, ("fine_tune_type is 'ia3'", FUSE)),
    "no scale": (lambda found: None, {"lora_parameters": {"rank": 3}}, ("has scale 'None'", "must be a number")),
    "no parameters": (lambda found: None, {"lora_parameters": None}, ("has scale 'None'",)),
    "a scale of two meanings": (
        lambda found: None,
        {"lora_parameters": {"rank": 3, "alpha": 16, "scale": 10.0}},
        ("has alpha, which mlx-lm once divided by the rank", "leave scale alone there"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, tensors: Tensors, tmp_path: Path) -> None:
    edit, said, fragments = REFUSED[what]
    edit(tensors)
    with pytest.raises(CheckpointError) as caught:
        opened(WRITTEN / "llama", write(tmp_path / "a", tensors, **said))
    for fragment in (*fragments, str(tmp_path / "a")):
        assert fragment in str(caught.value), str(caught.value)
