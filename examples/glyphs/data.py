"""Characters of several scripts, rendered from many fonts, and the nuisance that belongs to each task.

Images are float tensors (batch, 32, 32) in [0, 1], ink 1 on paper 0, unless a docstring says otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
INK = 24  # longest side of a rendered character, in pixels

# Families seen in pretraining and fine-tuning: PyPI packages less their prefix "fontpkg-", and matplotlib's
# DejaVu.
TRAIN_FAMILIES = """
alegreya-sans almarai amiri arimo assistant baloo-2 bitter cairo cardo caveat chakra-petch comfortaa cormorant
eb-garamond fira-code fira-sans geologica heebo hind ibm-plex-mono ibm-plex-sans-arabic ibm-plex-serif inter
jetbrains-mono kalam kanit literata merriweather montserrat mukta mulish noto-kufi-arabic noto-sans
noto-sans-arabic noto-sans-devanagari noto-sans-thai onest play playfair-display prompt pt-serif rajdhani
raleway roboto roboto-condensed roboto-slab sarabun source-code-pro source-sans-3 tajawal teko dejavu
"""
# Families that only the validation images, and only the test images, are rendered from.
VALIDATION_FAMILIES = "lora nunito pt-sans rubik sofia-sans"
TEST_FAMILIES = """
exo-2 frank-ruhl-libre ibm-plex-sans manrope noto-serif open-sans roboto-mono source-serif-4 vollkorn
"""
WEIGHTS = (300.0, 400.0, 600.0, 800.0)
STATIC_STYLES = """
Light Regular Bold Italic BoldItalic SemiBold LightItalic BoldOblique Oblique
"""


@dataclass(frozen=True)
class Face:
    """One font file at one weight; `weight` is None for a file that is not variable."""

    path: Path
    weight: float | None


def font_files(family: str) -> list[Path]:
    """The regular and slanted files of a family, sorted.

    Raises ModuleNotFoundError when its package is missing.
    """
    if family == "dejavu":
        import matplotlib

        files = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuS*.ttf"))
        return [path for path in files if "Display" not in path.name]
    package = importlib.import_module("fontpkg_" + family.replace("-", "_"))
    root = Path(package.__file__ or "").parent / "files"
    files = sorted([*root.glob("*.ttf"), *root.glob("*.otf")])
    return [path for path in files if "[" in path.name or path.stem.split("-")[-1] in STATIC_STYLES.split()]


def render(characters: str, families: str) -> Iterator[tuple[int, Face, np.ndarray]]:
    """Yield (index of the character, face, uint8 image SIZE x SIZE) for every face that has the character."""
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    for family in families.split():
        for path in font_files(family):
            known = TTFont(path, lazy=True).getBestCmap() or {}
            present = [(i, c) for i, c in enumerate(characters) if ord(c) in known]
            if not present:
                continue
            font = ImageFont.truetype(str(path), 64, layout_engine=ImageFont.Layout.BASIC)
            axes = font.get_variation_axes() if "[" in path.name else []
            bounds = [(a["minimum"] or 0, a["maximum"] or 0) for a in axes if a["name"] == b"Weight"]
            weights: list[float | None] = [w for w in WEIGHTS if bounds and bounds[0][0] <= w <= bounds[0][1]]
            for weight in weights or [None]:
                if weight is not None:
                    place = [weight if a["name"] == b"Weight" else float(a["default"] or 0) for a in axes]
                    font.set_variation_by_axes(place)
                for index, character in present:
                    left, top, right, bottom = font.getbbox(character)
                    width, height = int(right - left), int(bottom - top)
                    if width <= 0 or height <= 0:
                        continue
                    glyph = Image.new("L", (width, height))
                    ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=font)
                    scale = min(INK / max(width, height), 0.8)  # small marks stay small
                    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
                    canvas = Image.new("L", (SIZE, SIZE))
                    glyph = glyph.resize(shape, Image.Resampling.BOX)
                    canvas.paste(glyph, ((SIZE - shape[0]) // 2, (SIZE - shape[1]) // 2))
                    pixels = np.asarray(canvas)
                    if pixels.max() > 64:
                        yield index, Face(path, weight), pixels


def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1797 handwritten digits: uint8 images (n, 32, 32) enlarged from 8 x 8, int64 labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = F.interpolate(small, size=(28, 28), mode="bicubic", align_corners=False).clamp(0, 1)
    return (F.pad(large, (2, 2, 2, 2))[:, 0] * 255).round().byte().numpy(), digits.target.astype(np.int64)


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """A small random rotation, scale, shear and shift of every image."""
    n = len(images)
    u = (torch.rand(n, 6, generator=generator) * 2 - 1) * strength
    angle, scale_x, scale_y = u[:, 0] * 0.15, 1 + u[:, 1] * 0.12, 1 + u[:, 2] * 0.12
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos() * scale_x, -angle.sin() + u[:, 3] * 0.12
    matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin(), angle.cos() * scale_y
    matrix[:, :, 2] = u[:, 4:] * 0.12
    grid = F.affine_grid(matrix, [n, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mild random contrast, brightness and noise: all that pretraining sees of the tasks' nuisances."""
    u = torch.rand(3, len(images), 1, 1, generator=generator)
    gain = 0.5 + 0.5 * u[0]
    mixed = gain * images + (1 - gain) * u[1]
    return (mixed + 0.1 * u[2] * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def drop_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Three in five pixels are lost."""
    return images * (torch.rand(images.shape, generator=generator) > 0.6)


def stripes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bright horizontal stripes of random period and phase are added."""
    u = torch.rand(len(images), 3, 1, 1, generator=generator)
    rows = torch.arange(SIZE, dtype=torch.float32)[None, :, None]
    wave = torch.sin(2 * torch.pi * (rows / (4 + 4 * u[:, 0]) + u[:, 1]))
    return (0.75 * images + (0.35 + 0.2 * u[:, 2]) * (wave > 0.2)).clamp(0, 1)


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise on a picture of half the contrast."""
    return (0.25 + 0.5 * images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of 2.7 pixels."""
    taps = torch.exp(-(torch.arange(-7, 8, dtype=torch.float32) ** 2) / (2 * 2.7**2))
    taps = taps / taps.sum()
    x = F.conv2d(images[:, None], taps.view(1, 1, 15, 1), padding=(7, 0))
    return F.conv2d(x, taps.view(1, 1, 1, 15), padding=(0, 7))[:, 0]


def ramp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Low contrast on a background that brightens in a random direction."""
    angle = 2 * torch.pi * torch.rand(len(images), 1, 1, generator=generator)
    axis = torch.linspace(-0.5, 0.5, SIZE)
    slope = angle.cos() * axis[None, None, :] + angle.sin() * axis[None, :, None]
    return (0.5 + 0.7 * slope + 0.35 * (images - 0.5)).clamp(0, 1)


@dataclass(frozen=True)
class Task:
    """A recognition task: what is recognised and what makes it hard. No characters: handwritten digits."""

    characters: str
    nuisance: Callable[[Tensor, torch.Generator], Tensor]


def span(first: int, last: int) -> str:
    """All characters from code point `first` to `last`, both included."""
    return "".join(map(chr, range(first, last + 1)))


TASKS = {
    "digits": Task("", drop_pixels),
    "latin": Task(span(0x61, 0x7A), stripes),
    "greek": Task("αβγδεζηθικλμνξοπρστυφχψω", noise),
    "cyrillic": Task(span(0x430, 0x44F), blur),
    "hebrew": Task("אבגדהוזחטיכלמנסעפצקרשת", ramp),
}

# None of these is a character of a task: marks, accented letters, Armenian, Georgian, Arabic, Devanagari,
# Thai, symbols.
PRETRAINING = "".join(
    (
        "!#$%&()*+/<=>?@[]^_{}~¡¢£§©®°±µ¶¿\xd7÷€№™",
        span(0xC0, 0xD6),
        span(0xD8, 0xF6),
        span(0xF8, 0x17E),
        "ΆΈΉΊΌΎΏΐάέήίΰϊϋόύώΓΔΘΛΞΠΣΦΨΩ",
        "ЁЂЃЄЇЉЊЋЌЎЏБДЖЙЛЦЧЩЪЫЭЮЯёђѓєїљњћќўџґғҗқңұһәө",
        span(0x531, 0x556) + span(0x561, 0x586) + span(0x10D0, 0x10F0),
        span(0x627, 0x63A) + span(0x641, 0x64A) + span(0x660, 0x669),
        span(0x905, 0x914) + span(0x915, 0x939) + span(0x966, 0x96F),
        span(0xE01, 0xE2E) + span(0xE50, 0xE59),
        "←↑→↓↔∂∆∏∑√∞∫≈≠≤≥■□▲▶▼◆◊○●★♠♣♥♦",
    )
)
