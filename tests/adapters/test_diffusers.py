"""Adapters of diffusers: settings in the file's header, models of a pipeline, names of all its versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pymerge.errors import CheckpointError
from tests.helpers.adapters import Tensors, applied, opened, read_all
from tests.helpers.checkpoints import write_model

WRITTEN = Path(__file__).parent / "written" / "diffusers"
PIPELINE = WRITTEN / "pipeline"
FILE = "pytorch_lora_weights.safetensors"
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
Q = f"unet.{ATTENTION}.to_q"


@pytest.fixture
def tensors() -> Tensors:
    return load_file(WRITTEN / "header" / FILE)


@pytest.fixture
def said() -> dict[str, Any]:
    """The settings in the header of that file."""
    with safe_open(WRITTEN / "header" / FILE, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lora_adapter_metadata"])
    return found


def write(folder: Path, tensors: Tensors, said: dict[str, Any] | str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = said if isinstance(said, str) or said is None else json.dumps(said)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        folder / FILE,
        metadata={"format": "pt"} | ({} if text is None else {"lora_adapter_metadata": text}),
    )
    return folder


def base_of(tensors: Tensors) -> Tensors:
    """A unet of linear layers alone."""
    sizes = {key.removesuffix(".lora_B.weight"): tensor.shape[0] for key, tensor in tensors.items() if "lora_B" in key}
    return {f"{name}.weight": torch.randn(rows, 8) for name, rows in sizes.items()}


PLAIN = {"attn1.to_q.lora_A.weight": torch.randn(2, 8), "attn1.to_q.lora_B.weight": torch.randn(6, 2)}
OUT = {"attn1.to_out.0.lora_A.weight": torch.randn(2, 8), "attn1.to_out.0.lora_B.weight": torch.randn(6, 2)}


def replaced(key: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        key = key.replace(old, new)
    return key


NAMES: dict[str, Callable[[str], str]] = {
    "of one model": lambda key: key,
    "of a unet": lambda key: f"unet.{key}",
    "of a transformer": lambda key: f"transformer.{key}",
    "of ComfyUI": lambda key: f"diffusion_model.{replaced(key, ('lora_A', 'lora_down'), ('lora_B', 'lora_up'))}",
    "with an adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "before it had PEFT": lambda key: replaced(key, ("lora_A", "lora.down"), ("lora_B", "lora.up")),
    "of attention processors": lambda key: replaced(
        key, ("attn1.", "attn1.processor."), (".0.", "."), (".lora_A", "_lora.down"), (".lora_B", "_lora.up")
    ),
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES)
def test_names_of_all_versions_give_the_same(names: str, tmp_path: Path) -> None:
    own = base_of(PLAIN | OUT)
    base = write_model(tmp_path / "base", own)
    read = read_all(
        opened(base, write(tmp_path / "a", {NAMES[names](key): each for key, each in (PLAIN | OUT).items()}))
    )
    for name, tensor in applied(own, PLAIN | OUT, 1.0).items():
        torch.testing.assert_close(read[name].double(), tensor, rtol=1e-6, atol=1e-6)


def test_names_of_text_encoders_before_it_had_peft(tmp_path: Path) -> None:
    own = {f"layers.0.self_attn.{word}_proj.weight": torch.randn(8, 8) for word in ("q", "k", "v", "out")}
    found = {}
    for name in own:
        word = name.split(".")[3].removesuffix("_proj")
        for way, shape in (("down", (2, 8)), ("up", (8, 2))):
            found[f"text_encoder.layers.0.self_attn.to_{word}_lora.{way}.weight"] = torch.randn(shape)
    read = read_all(opened(write_model(tmp_path / "base", own), write(tmp_path / "a", found)))
    for name, tensor in own.items():
        stem = f"text_encoder.layers.0.self_attn.to_{name.split('.')[3].removesuffix('_proj')}_lora"
        delta = found[f"{stem}.up.weight"].double() @ found[f"{stem}.down.weight"].double()
        torch.testing.assert_close(read[name].double(), tensor + delta, rtol=1e-6, atol=1e-6)


def test_the_scale_is_in_the_header_or_beside_the_factors(tmp_path: Path) -> None:
    own = base_of(PLAIN | OUT)
    base = write_model(tmp_path / "base", own)
    named = {f"unet.{key}": tensor for key, tensor in (PLAIN | OUT).items()}
    header = {"unet.r": 2, "unet.lora_alpha": 3}
    alphas = {f"unet.attn1.{module}.alpha": torch.tensor(3.0) for module in ("to_q", "to_out.0")}
    expected = applied(own, PLAIN | OUT, 1.5)
    for number, folder in enumerate((write(tmp_path / "a", named, header), write(tmp_path / "b", named | alphas))):
        read = read_all(opened(base, folder))
        for name, tensor in expected.items():
            torch.testing.assert_close(read[name].double(), tensor, rtol=1e-6, atol=1e-6, msg=str(number))


def test_a_bias_of_lora_b(tmp_path: Path) -> None:
    own = base_of(PLAIN) | {"attn1.to_q.bias": torch.randn(6)}
    found = PLAIN | {"attn1.to_q.lora_B.bias": torch.randn(6)}
    read = read_all(opened(write_model(tmp_path / "base", own), write(tmp_path / "a", found)))
    torch.testing.assert_close(read["attn1.to_q.bias"], own["attn1.to_q.bias"] + found["attn1.to_q.lora_B.bias"])


def test_patterns_that_overlap_are_said(tmp_path: Path) -> None:
    header = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 4, "to_q": 8}}
    own = base_of(PLAIN)
    checkpoint = opened(write_model(tmp_path / "base", own), write(tmp_path / "a", PLAIN, header))
    assert "the patterns 'attn1.to_q', 'to_q' all fit attn1.to_q; the first is taken" in checkpoint.notes[0]
    expected = applied(own, PLAIN, 2.0)["attn1.to_q.weight"]
    torch.testing.assert_close(read_all(checkpoint)["attn1.to_q.weight"].double(), expected, rtol=1e-6, atol=1e-6)


class TestComponents:
    """Which of a file's models a base is."""

    @staticmethod
    def two(tmp_path: Path) -> Path:
        found = {
            f"{part}.{key}": tensor for part in ("text_encoder", "text_encoder_2") for key, tensor in PLAIN.items()
        }
        found |= {key: 2 * tensor if "encoder_2" in key else tensor for key, tensor in found.items()}
        return write(tmp_path / "a", found)

    def test_two_of_one_architecture_are_told_apart_by_the_folder(self, tmp_path: Path) -> None:
        adapter, own = self.two(tmp_path), base_of(PLAIN)
        for part, scale in (("text_encoder", 1.0), ("text_encoder_2", 4.0)):
            base = write_model(tmp_path / part, own)
            read = read_all(opened(base, adapter))["attn1.to_q.weight"]
            expected = applied(own, PLAIN, scale)["attn1.to_q.weight"]
            torch.testing.assert_close(read.double(), expected, rtol=1e-6, atol=1e-6)

    def test_where_the_folder_does_not_say_it_is_open(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has modules of text_encoder and of text_encoder_2, and both fit"):
            opened(write_model(tmp_path / "base", base_of(PLAIN)), self.two(tmp_path))

    def test_a_part_of_one_is_an_error(self, tmp_path: Path) -> None:
        """Nothing of a component is left out: of the one that fits best, or that has the folder's name."""
        found = {f"unet.{key}": tensor for key, tensor in (PLAIN | OUT).items()}
        own = base_of(PLAIN)
        base = write_model(tmp_path / "base", own)
        with pytest.raises(CheckpointError, match=r"adapts 'attn1\.to_out\.0' of unet, which"):
            opened(base, write(tmp_path / "a", found))
        found |= {f"text_encoder.{key}": tensor for key, tensor in PLAIN.items()}
        with pytest.raises(CheckpointError, match=r"adapts 'attn1\.to_out\.0' of unet, which"):
            opened(write_model(tmp_path / "unet", own), write(tmp_path / "b", found))

    def test_none_fits(self, tensors: Tensors, said: dict[str, Any], tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"a.weight": torch.ones(8, 8)})
        with pytest.raises(
            CheckpointError, match=r"which .*base has not, or in other sizes; .*of a pipeline one of its"
        ):
            opened(base, write(tmp_path / "a", tensors, said))


def lone(found: Tensors, said: dict[str, Any]) -> None:
    del found[f"{Q}.lora_B.weight"]


def unknown(found: Tensors, said: dict[str, Any]) -> None:
    found[f"{Q}.lokr_w1"] = torch.ones(2, 2)


def whole(found: Tensors, said: dict[str, Any]) -> None:
    found["unet.conv_in.weight"] = torch.ones(2, 2)


def alpha_too(found: Tensors, said: dict[str, Any]) -> None:
    found[f"{Q}.alpha"] = torch.tensor(2.0)


def of_one_alone(found: Tensors, said: dict[str, Any]) -> None:
    for key in [key for key in said if key.startswith("text_encoder")]:
        del said[key]


def without_factors(found: Tensors, said: dict[str, Any]) -> None:
    for key in [key for key in found if key.startswith("text_encoder")]:
        del found[key]


def other_rank(found: Tensors, said: dict[str, Any]) -> None:
    said["unet.r"] = 5


def variant(found: Tensors, said: dict[str, Any]) -> None:
    said["unet.init_lora_weights"] = "corda"


def lengths(found: Tensors, said: dict[str, Any]) -> None:
    found[f"{Q}.lora_magnitude_vector"] = torch.ones(8)


def misfit(found: Tensors, said: dict[str, Any]) -> None:
    found[f"{Q}.lora_A.weight"] = torch.ones(3, 9)


REFUSED: dict[str, tuple[Callable[[Tensors, dict[str, Any]], None], tuple[str, ...]]] = {
    "a factor alone": (lone, (f"no lora_B of {ATTENTION}.to_q", "save_lora_weights")),
    "another method": (unknown, (f"{Q}.lokr_w1' has no name of plain LoRA", "pipe.fuse_lora()")),
    "whole tensors": (whole, ("unet.conv_in.weight' has no name of plain LoRA",)),
    "two scales": (alpha_too, (f"{Q}.alpha' and lora_adapter_metadata", "both say how it is scaled")),
    "settings of one model": (
        of_one_alone,
        ("has settings of 'unet', and the file factors of 'text_encoder', 'unet'",),
    ),
    "settings without factors": (
        without_factors,
        ("settings of 'text_encoder', 'unet', and the file factors of 'unet'",),
    ),
    "another rank": (other_rank, ("says 5, so that diffusers cannot load it",)),
    "a base that changes": (variant, ("init_lora_weights: corda", "merge it where it was trained")),
    "lengths of one module": (lengths, ("lora_magnitude_vector of", "use_dora: true")),
    "another size": (misfit, (f"'{ATTENTION}.to_q' of unet, which", "or in other sizes")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, tensors: Tensors, said: dict[str, Any], tmp_path: Path) -> None:
    edit, fragments = REFUSED[what]
    edit(tensors, said)
    folder = write(tmp_path / "a", tensors, said)
    with pytest.raises(CheckpointError) as caught:
        opened(PIPELINE / "unet", folder)
    for fragment in (*fragments, str(folder)):
        assert fragment in str(caught.value), str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}'])
def test_a_header_that_is_no_json(text: str, tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lora_adapter_metadata of its header is no JSON object"):
        opened(PIPELINE / "unet", write(tmp_path / "a", tensors, text))
