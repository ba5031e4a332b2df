"""glyphs8: eight character recognition tasks, each with a nuisance of its own, and the characters of the base.

Rendering, heads and training are those of examples/glyphs; here is what differs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.glyphs import data
from examples.glyphs.data import SIZE, Task, span
from examples.glyphs.model import GlyphVit, GlyphVitConfig
from examples.glyphs.train import render_parts, split_digits

CONFIG = GlyphVitConfig(
    stem_channels=(32, 64),
    hidden_size=192,
    num_hidden_layers=7,
    num_attention_heads=6,
    intermediate_size=768,
)

# The example's families, less two that Devanagari is validated and tested on.
TRAIN_FAMILIES = " ".join(family for family in data.TRAIN_FAMILIES.split() if family not in ("hind", "mukta"))
VALIDATION_FAMILIES = f"{data.VALIDATION_FAMILIES} mukta"
TEST_FAMILIES = f"{data.TEST_FAMILIES} hind poppins"


def wave(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rows are shifted sideways, by up to 3 pixels, along a sine of random period and phase."""
    u = torch.rand(len(images), 2, 1, 1, generator=generator)
    axis = (torch.arange(SIZE) + 0.5) / (SIZE / 2) - 1
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    shift = 0.2 * torch.sin(2 * torch.pi * ((rows + 1) * (0.6 + 0.6 * u[:, 0]) + u[:, 1]))
    grid = torch.stack([columns + shift, rows.expand_as(shift)], 3)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def upright_stripes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bright vertical stripes of random period and phase are added."""
    return data.stripes(images.mT, generator).mT


def slanted_stripes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bright diagonal stripes of random period and phase are added."""
    u = torch.rand(len(images), 3, 1, 1, generator=generator)
    axis = torch.arange(SIZE) * 0.7
    across = torch.sin(2 * torch.pi * ((axis[:, None] + axis) / (4 + 4 * u[:, 0]) + u[:, 1]))
    return (0.75 * images + (0.35 + 0.2 * u[:, 2]) * (across > 0.2)).clamp(0, 1)


def salt_and_pepper(images: Tensor, generator: torch.Generator) -> Tensor:
    """One pixel in ten becomes black, one in ten white."""
    u = torch.rand(images.shape, generator=generator)
    return images.masked_fill(u < 0.1, 0.0).masked_fill(u > 0.9, 1.0)


TASKS = {
    "digits": Task("", data.drop_pixels),  # handwritten, from scikit-learn
    "latin": Task(data.TASKS["latin"].characters, data.stripes),
    "capitals": Task(span(0x41, 0x5A), wave),
    "greek": Task(data.TASKS["greek"].characters, data.noise),
    "cyrillic": Task(data.TASKS["cyrillic"].characters, data.blur),
    "hebrew": Task(data.TASKS["hebrew"].characters, slanted_stripes),
    "devanagari": Task("अआइईउऊऋएऐओऔ" + span(0x915, 0x928) + span(0x92A, 0x930) + "लळवशषसह", upright_stripes),
    "signs": Task("!#$%&()*+/<=>?@[]^_{}~¡¢£§©®°±¶¿÷€∂∏∑√∞∫≈≠≤≥", salt_and_pepper),
}

# Accented and phonetic Latin, other Greek and Cyrillic letters, Armenian, Georgian, Arabic, Thai, letterlike symbols,
# arrows, operators and shapes, without those that look like a character of a task.
PRETRAINING = "".join(
    (
        "¤¥¦ª¬¹²³ºĸſ",
        span(0xC0, 0xD6) + span(0xD8, 0xF6) + span(0xF8, 0x1BF) + span(0x1C4, 0x250) + span(0x252, 0x260),
        span(0x262, 0x2AF) + span(0x1E00, 0x1E9F),
        "ΆΈΉΊΌΎΏΐάέήίΰϊϋόύώΓΔΘΛΞΦΨΩ",
        "ЁЂЃЄЇЉЊЋЌЎЏБДЖЙЛЦЧЩЪЫЭЮЯ" + "ѐёђѓєїљњћќѝўџ" + span(0x462, 0x481) + span(0x48A, 0x4BA) + span(0x4BC, 0x4FF),
        span(0x531, 0x556) + span(0x561, 0x586) + span(0x10D0, 0x10F0),
        span(0x627, 0x63A) + span(0x641, 0x64A) + span(0x660, 0x669),
        span(0xE01, 0xE2E) + span(0xE50, 0xE59),
        span(0x2100, 0x214F) + span(0x2190, 0x21FF) + span(0x25A0, 0x25FF),
        "∀∁∃∄∅∇∈∉∋∌∐∓∗∘∙∛∜∝∟∠∣∤∥∦∧∨∩∪∬∴∵∶∷∼≁≃≅≉≡≢≪≫≮≯≰≱≲≳⊂⊃⊄⊅⊆⊇⊕⊖⊗⊘⊙⊢⊣⊤⊥⌂⌐",
    )
)
DIGITS_TEST, DIGITS_VALIDATION = 500, 200  # of 1797
MIN_FACES = 12  # a character of pretraining that fewer faces have is left out


def well_covered(images: Tensor, labels: Tensor, least: int = MIN_FACES) -> tuple[Tensor, Tensor]:
    """The images of the classes that have `least` images or more, and their labels, renumbered without gaps."""
    counts = labels.bincount()
    kept = counts >= least
    renumbered = kept.cumsum(0) - 1
    chosen = kept[labels]
    return images[chosen], renumbered[labels[chosen]]


def characters(progress: Progress, tasks: Mapping[str, Task], pretraining: str) -> dict[str, Tensor]:
    """PART.images (n, 32, 32) uint8, without nuisances, and PART.labels (n,) int64, for all parts.

    Raises ModuleNotFoundError when a font's package is missing: requirements.txt names them all.
    """
    parts = {"pretraining": (pretraining, TRAIN_FAMILIES)} if pretraining else {}
    for name, task in tasks.items():
        if task.characters:
            parts[f"{name}.train"] = (task.characters, TRAIN_FAMILIES)
            parts[f"{name}.validation"] = (task.characters, VALIDATION_FAMILIES)
            parts[f"{name}.test"] = (task.characters, TEST_FAMILIES)
    tensors = render_parts(parts, progress)
    if pretraining:
        kept = well_covered(tensors["pretraining.images"], tensors["pretraining.labels"])
        tensors["pretraining.images"], tensors["pretraining.labels"] = kept
    return tensors | split_digits(DIGITS_TEST, DIGITS_VALIDATION)


def fast_products() -> str:
    """The dtype of products that trains fastest here: bfloat16 where the CPU has units for it, else float32."""
    known = torch.cpu.get_capabilities()
    return "bfloat16" if any(known.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16")) else "float32"


def forward(model: GlyphVit, images: Tensor, products: str = "bfloat16") -> Tensor:
    """Features in float32, products in this dtype.

    On CPUs PyTorch's fused attention has a slow backward pass in bfloat16, so attention is plain products.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=products == "bfloat16"):
        features: Tensor = model(images)
    return features.float()
