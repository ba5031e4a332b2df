"""Adapters that PEFT writes, against what its own merge_and_unload makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from pymerge.adapters.low_rank import low_rank_of
from pymerge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pymerge.checkpoint.reader import Reader
from tests.helpers.adapters import opened, read_all

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=60,
            max_position_embeddings=16,
            tie_word_embeddings=False,
            attention_bias=True,
        )
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16, tie_word_embeddings=False)
    )


def neox() -> nn.Module:
    """Its head has another name in memory than in files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=40, max_position_embeddings=16))


def llava() -> nn.Module:
    """Two towers with modules of the same names, both called otherwise in files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=16, num_key_value_heads=2)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=39))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        )
    )


def dinov2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return Dinov2ForImageClassification(Dinov2Config(**sizes, mlp_ratio=2, num_labels=3))


def swin() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(**sizes, num_labels=3))


class Layers(nn.Module):
    """Kinds of layers that no language model has."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3)
        self.two = nn.Conv2d(6, 8, 3)
        self.point = nn.Conv2d(6, 8, 1)
        self.three = nn.Conv3d(4, 6, 2)
        self.attention = nn.MultiheadAttention(16, 2)
        self.square = nn.Linear(16, 16)
        self.table = nn.Embedding(20, 16)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers()


def trained(model: nn.Module, config: Any) -> Any:
    """An adapter on the model with random values in all that is trained."""
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrapped


def save(model: nn.Module, folder: Path) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def compared(make: Callable[[], nn.Module], config: Any, tmp_path: Path, sums: int = 1) -> tuple[dict[str, float], int]:
    """For each tensor the largest difference, element by element, as a share of `bounds`, and how many tensors the
    adapter changes."""
    base = save(make(), tmp_path / "base")
    trained(make(), config).save_pretrained(tmp_path / "adapter")
    expected = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").merge_and_unload()
    merged = read_all(open_checkpoint(save(expected, tmp_path / "expected")))
    found, before = opened(base, tmp_path / "adapter"), read_all(open_checkpoint(base))
    most, errors = bounds(found, before, merged, sums), {}
    for name, tensor in read_all(found).items():
        error = (tensor.double() - merged[name].double()).abs().numpy()
        errors[name] = float((error / most[name]).max())
    assert errors.keys() == merged.keys()
    return errors, sum(not torch.equal(merged[name], before[name]) for name in before)


def bounds(
    found: Checkpoint, base: dict[str, Tensor], merged: dict[str, Tensor], sums: int
) -> dict[str, NDArray[np.float64]]:
    """By how much two sums in float32 of the same factors may differ, element by element: W = W_0 + s B A.

    Each sum is rounded by half a unit in the last place of W, of what is summed in `sums` steps by as much in each: one
    unit of max(|W_0|, |W|) if B A were known. But a product of r terms is rounded by up to gamma_r = r u / (1 - r u)
    of |B| |A|, in the order of each library, and with s by one more step; where terms cancel each other that is any
    number of units of W: of (1, 2^-24, -1) . (1, 1, 1) the sum is 0 from the left, and 2^-24 if the ones come first.
    DoRA multiplies all by g / ||V||, whose sum of n squares and root are rounded likewise.
    """
    u, most = 2.0**-24, {}
    with Reader(found.stamps | (found.base.stamps if found.base else {})) as reader:
        for name, entry in found.tensors.items():
            before, after = (each[name].double().numpy() for each in (base, merged))
            unit = np.spacing(np.maximum(np.abs(before), np.abs(after)).astype(np.float32)).astype(np.float64)
            most[name] = unit * (1 + sums) / 2
            if (made := low_rank_of(entry)) is None:
                continue
            left, right = made.factors(reader.read_bytes, 0)
            steps = (left.shape[1] + 1) * u
            terms = 2 * steps / (1 - steps) * (np.abs(left) @ np.abs(right)).reshape(before.shape)
            if made.magnitude is not None:
                V = before + (left @ right).reshape(before.shape)
                ratio = np.abs(after / V)
                terms = ratio * (terms + unit) + 2 * (V.size / len(V) + 4) * u * np.abs(after)
            most[name] = most[name] + terms
    return most


LINEAR = ["q_proj", "v_proj", "down_proj"]


def lora(targets: list[str] | str | None = None, **more: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets or LINEAR, **more)


def block_diagonal() -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    return lora(["q_proj", "o_proj"], use_bdlora=blocks)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int]] = {
    "plain": (llama, lora, 9),
    "rank-stabilised": (llama, lambda: lora(use_rslora=True), 9),
    "patterns": (
        llama,
        lambda: lora(rank_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 8}, alpha_pattern={"down_proj": 3}),
        9,
    ),
    "patterns and rank-stabilised": (llama, lambda: lora(rank_pattern={"v_proj": 8}, use_rslora=True), 9),
    "patterns that overlap": (llama, lambda: lora(rank_pattern={"layers.1.*.q_proj": 2, "q_proj": 8}), 9),
    "a parameter by its name": (
        llama,
        lambda: lora(["v_proj"], target_parameters=["q_proj.weight"], alpha_pattern={"q_proj": 3, "v_proj.weight": 5}),
        6,
    ),
    "DoRA": (llama, lambda: lora(use_dora=True), 9),
    "DoRA and rank-stabilised": (llama, lambda: lora(use_dora=True, use_rslora=True), 9),
    "DoRA of an embedding": (llama, lambda: lora([*LINEAR, "embed_tokens"], use_dora=True), 10),
    "all biases": (llama, lambda: lora(bias="all"), 21),
    "biases of adapted layers": (llama, lambda: lora(bias="lora_only"), 15),
    "factors with a bias": (llama, lambda: lora(["q_proj", "v_proj"], lora_bias=True), 12),
    "saved modules": (llama, lambda: lora(modules_to_save=["norm", "lm_head"]), 17),
    "trained tokens": (llama, lambda: lora(trainable_token_indices=[3, 7, 59]), 10),
    "tokens of both tables": (llama, lambda: lora(trainable_token_indices={"embed_tokens": [3], "lm_head": [1]}), 11),
    "embedding and head": (llama, lambda: lora([*LINEAR, "embed_tokens", "lm_head"]), 11),
    "some layers": (llama, lambda: lora(layers_to_transform=[1]), 3),
    "all but one": (llama, lambda: lora(exclude_modules=["layers.0.self_attn.q_proj"]), 8),
    "orthogonal": (llama, lambda: lora(init_lora_weights="orthogonal"), 9),
    "block-diagonal": (llama, block_diagonal, 6),
    "stored transposed": (gpt2, lambda: lora(["c_attn", "c_proj", "c_fc"]), 8),
    "stored transposed, DoRA": (gpt2, lambda: lora(["c_attn", "c_proj", "c_fc"], use_dora=True), 8),
    "renamed in memory": (vit, lambda: lora(["q_proj", "fc1"], bias="all", modules_to_save=["classifier"]), 24),
    "renamed, two towers": (llava, lambda: lora("all-linear", bias="all", modules_to_save=["norm"]), 32),
    "renamed, a saved head": (neox, lambda: lora(["query_key_value"], modules_to_save=["lm_head"]), 2),
    "renamed, a patch embedding": (vit, lambda: lora(["projection", "q_proj"]), 3),
    "renamed in DINOv2": (dinov2, lambda: lora("all-linear"), 13),
    "renamed in Swin": (swin, lambda: lora(["query", "q_proj", "fc1", "dense"], bias="all"), 25),
    "attention in one": (layers, lambda: lora(["attention", "square"]), 3),
    "a table": (layers, lambda: lora(["table"]), 1),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_what_peft_merges(what: str, tmp_path: Path) -> None:
    make, config, changes = CASES[what]
    errors, changed = compared(
        make, config(), tmp_path, sums=2 if what == "attention in one" else 1
    )  # out_proj's, twice
    assert changed == changes
    assert max(errors.values()) <= 1, {name: error for name, error in errors.items() if error > 1}


def test_the_bound_is_some_units_of_an_element(tmp_path: Path) -> None:
    """Of rank 4, and where nothing cancels: the comparisons above say something of every element."""
    base = save(llama(), tmp_path / "base")
    trained(llama(), lora()).save_pretrained(tmp_path / "adapter")
    found = opened(base, tmp_path / "adapter")
    before, after = read_all(open_checkpoint(base)), read_all(found)
    for name, bound in bounds(found, before, after, 1).items():
        unit = np.spacing(torch.maximum(before[name].abs(), after[name].abs()).numpy())
        assert 1 <= np.median(bound / unit) <= 32, name


@pytest.mark.parametrize("rank", [4, 64])
def test_no_number_of_units_bounds_what_cancels(rank: int) -> None:
    """Two orders of the same terms, both right: the reason for the second term of `bounds`."""
    b = np.array([1.0, 2.0**-24, -1.0] + [0.0] * (rank - 3), np.float32)
    forwards = np.float32(0)
    for term in b:
        forwards += term
    ones_first = np.float32(np.float32(b[0] + b[2]) + b[1])
    assert (forwards, ones_first) == (0.0, 2.0**-24)
    assert abs(ones_first - forwards) <= 2 * (rank + 1) * 2.0**-24 * np.abs(b).sum()


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions(dora: bool, tmp_path: Path) -> None:
    """PEFT computes them by a convolution, in another order."""
    errors, changed = compared(layers, lora(["one", "two", "point", "three"], use_dora=dora), tmp_path)
    assert changed == 4
    assert max(errors.values()) <= 1


def test_sixteen_bits(tmp_path: Path) -> None:
    """PEFT rounds the product and the sum; here the sum alone is rounded, by the merge."""

    def half() -> nn.Module:
        return llama().to(torch.bfloat16)

    base = save(half(), tmp_path / "base")
    trained(half(), lora()).save_pretrained(tmp_path / "adapter")
    expected = peft.PeftModel.from_pretrained(half(), tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in read_all(opened(base, tmp_path / "adapter")).items():
        size = torch.maximum(expected[name].abs(), tensor.to(torch.bfloat16).abs()).float()
        assert ((tensor.to(torch.bfloat16) - expected[name]).abs().float() <= 2.0**-7 * size).all(), name
