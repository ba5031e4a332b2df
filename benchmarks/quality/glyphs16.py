"""glyphs16: sixteen tasks for the base of glyphs8, none of them one of its eight.

Eight have glyphs8's characters with another nuisance, eight have characters of their own. Fonts are glyphs8's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality import glyphs8
from examples.glyphs import data
from examples.glyphs.data import SIZE, Task, span


def mosaic(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blocks of 3 x 3 pixels have their mean, the grid begins anywhere."""
    u = torch.randint(3, (2,), generator=generator).tolist()
    shifted = images.roll((u[0], u[1]), (1, 2))
    coarse = F.avg_pool2d(F.pad(shifted[:, None], (0, 1, 0, 1)), 3)
    fine = coarse.repeat_interleave(3, 2).repeat_interleave(3, 3)[:, 0, :SIZE, :SIZE]
    return fine.roll((-u[0], -u[1]), (1, 2))


def scratches(images: Tensor, generator: torch.Generator) -> Tensor:
    """Four bright lines at random places and angles are drawn over the character."""
    u = torch.rand(len(images), 4, 2, 1, 1, generator=generator)
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    angle, offset = torch.pi * u[:, :, 0], SIZE * (u[:, :, 1] - 0.5)
    distance = (axis[:, None] * angle.sin() + axis * angle.cos() - offset).abs()
    return torch.maximum(images, (1.5 - distance).clamp(0, 1).amax(1))


def clouds(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random bright patches some six pixels wide lie over a picture of less contrast."""
    coarse = torch.rand(len(images), 1, 6, 6, generator=generator)
    patches = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=False)[:, 0]
    return (0.5 * images + 0.8 * patches - 0.15).clamp(0, 1)


def checks(images: Tensor, generator: torch.Generator) -> Tensor:
    """A bright chequered pattern of random period and place is added."""
    u = torch.rand(len(images), 3, 1, 1, generator=generator)
    axis = torch.arange(SIZE)
    wave = (2 * torch.pi * (axis / (5 + 4 * u[:, 0]) + u[:, 1])).sin()
    pattern = (wave * wave.mT) > 0
    return (0.75 * images + (0.3 + 0.2 * u[:, 2]) * pattern).clamp(0, 1)


def lost_columns(images: Tensor, generator: torch.Generator) -> Tensor:
    """Two in five columns of pixels are lost."""
    return images * (torch.rand(len(images), 1, SIZE, generator=generator) > 0.4)


def negative(images: Tensor, generator: torch.Generator) -> Tensor:
    """White ink on black paper, of random contrast."""
    u = torch.rand(len(images), 1, 1, generator=generator)
    return 1 - (0.6 + 0.4 * u) * images


def tilt(images: Tensor, generator: torch.Generator) -> Tensor:
    """A turn by up to 40 degrees."""
    angle = (torch.rand(len(images), generator=generator) * 2 - 1) * torch.pi * 40 / 180
    zero = torch.zeros_like(angle)
    matrix = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [len(images), 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def outlines(images: Tensor, generator: torch.Generator) -> Tensor:
    """The edges of the strokes alone."""
    thick = F.max_pool2d(images[:, None], 3, 1, 1)
    thin = -F.max_pool2d(-images[:, None], 3, 1, 1)
    return (thick - thin)[:, 0]


def motion(images: Tensor, generator: torch.Generator) -> Tensor:
    """A blur of seven pixels along rows."""
    return F.avg_pool2d(images[:, None], (1, 7), 1, (0, 3))[:, 0]


def characters_of(task: str) -> str:
    """What a task of glyphs8 recognises."""
    return glyphs8.TASKS[task].characters


# Hebrew, final letters and letters with a point: those as code points, since editors take them apart.
POINTED = "ךםןףץ" + "".join(span(*ends) for ends in ((0xFB2A, 0xFB2B), (0xFB30, 0xFB36), (0xFB38, 0xFB3C)))
POINTED += "".join(map(chr, (0xFB3E, 0xFB40, 0xFB41, 0xFB43, 0xFB44, *range(0xFB46, 0xFB4B))))
TASKS = {
    "digits": Task("", mosaic),
    "vietnamese": Task("".join(map(chr, range(0x1EA1, 0x1EFA, 2))), negative),
    "latin": Task(characters_of("latin"), data.ramp),
    "numerals": Task(span(0x30, 0x39) + "¼½¾⅓⅔⅛⅜⅝⅞", tilt),
    "capitals": Task(characters_of("capitals"), data.noise),
    "currencies": Task("₡₣₤₦₧₨₩₪₫₭₮₱₲₴₵₸₹₺₼₽", outlines),
    "greek": Task(characters_of("greek"), scratches),
    "pointed": Task(POINTED, motion),
    "cyrillic": Task(characters_of("cyrillic"), clouds),
    "greek_capitals": Task("ΑΒΕΖΗΙΚΜΝΟΠΡΣΤΥΧ", glyphs8.wave),
    "hebrew": Task(characters_of("hebrew"), checks),
    "vietnamese_capitals": Task("".join(map(chr, range(0x1EA0, 0x1EF9, 2))), glyphs8.salt_and_pepper),
    "devanagari": Task(characters_of("devanagari"), data.drop_pixels),
    "punctuation": Task("\"',.:;`|·«»‘“„†‡•…‰‹›\\×—", data.stripes),
    "signs": Task(characters_of("signs"), lost_columns),
    "cyrillic_capitals": Task("АВГЕЗИКМНОПРСТУФХШЬ", glyphs8.slanted_stripes),
}
