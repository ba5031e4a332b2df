"""Launch sizes by architecture, and what the kernels share.

A static table: Triton's autotuner needs a driver and would choose differently from run to run, and with the tile the
order of sums changes, so results would differ from run to run too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Terms that tensor cores add up one after the other: each of their sums is rounded towards zero, so the error of a long
# one grows with its length, not its root. Longer ones are sums of such parts, which are rounded to the nearest. The
# same for every depth of a tile.
MOST_SUMMED = 2048


class Sizes(NamedTuple):
    """Sizes of one launch."""

    block: int  # elements (of what goes element by element), or rows and columns of a tile of the result
    depth: int = 0  # of the products' inner dimension, what a step takes
    warps: int = 4
    stages: int = 1  # steps whose loads are in flight
    group: int = 8  # tile rows that are walked together, so that they share operands in L2


Table = Mapping[str, tuple[Sizes, ...]]  # sizes of one architecture


class Variant(NamedTuple):
    """A kernel with the types of its arguments, to be compiled without a device. Each module lists its `variants`."""

    name: str  # the op, and what distinguishes the variant
    kernel: Any
    types: dict[str, Any]  # argument -> type; for a tuple of pointers, a tuple
    constants: dict[str, Any]
    size: Sizes
    contracts: bool = True  # False: launched with enable_fp_fusion=False


# Experts of each dtype, as types of a kernel's arguments.
EXPERTS = ("*bf16", "*fp32", "*fp16")


def results() -> tuple[tuple[str, str, bool], ...]:
    """Name, type and TO_BF16 of the results that `store_rounded` writes."""
    return ("fp32", "*fp32", False), ("bf16", "*i16", True)


# compute capability -> kernel -> sizes, largest first; not yet timed. A device takes the newest row not newer than
# itself. What bounds them is registers and shared memory: wudi_adam's operands wait there, four tiles a stage. These
# compile to no more than 128 bytes of local memory a thread; wudi_adam's 128 to 1,340, all of it behind the loop.
SIZES: Mapping[int, Table] = {
    80: {
        "elementwise": (Sizes(1024),),
        "mask": (Sizes(4096, warps=8), Sizes(1024)),
        "task_dots": (Sizes(16384, depth=128), Sizes(2048, depth=128)),
        "wudi_adam": (Sizes(128, depth=32, warps=8, stages=3), Sizes(64, depth=32, stages=4)),
        "routed_linear": (Sizes(64, depth=32, stages=3),),
    },
    90: {
        "elementwise": (Sizes(1024),),
        "mask": (Sizes(4096, warps=8), Sizes(1024)),
        "task_dots": (Sizes(16384, depth=128), Sizes(2048, depth=128)),
        "wudi_adam": (Sizes(128, depth=64, warps=8, stages=3), Sizes(64, depth=64, stages=4)),
        "routed_linear": (Sizes(64, depth=32, stages=3),),
    },
}
# Small enough for the shapes of tests to have several tiles.
_INTERPRETED = {"elementwise": Sizes(1024), "mask": Sizes(1024), "task_dots": Sizes(512, depth=128)}
_INTERPRETED_TILES = Sizes(64, depth=16, group=2)

# A smaller tile is taken where the larger one would leave multiprocessors idle: an A100 has 108, an H100 132.
_BLOCKS = 108


def sizes(name: str, device: torch.device, blocks: Callable[[int], int]) -> Sizes:
    """Launch sizes of a kernel on a device, or in the interpreter.

    `blocks` gives the number of blocks for a size of `block`, of one layer: were those of a whole batch counted, its
    other layers would decide about the order of a layer's sums.
    """
    if device.type != "cuda":
        return _INTERPRETED.get(name, _INTERPRETED_TILES)
    major, minor = torch.cuda.get_device_capability(device)
    capability = max(10 * major + minor, min(SIZES))
    options = SIZES[max(row for row in SIZES if row <= capability)][name]
    return next((option for option in options if blocks(option.block) >= _BLOCKS), options[-1])


@triton.jit
def grouped_tile(place, rows, columns, GROUP: tl.constexpr):
    """(row, column) of tile number `place` of rows x columns tiles, GROUP rows at a time, column by column.

    Blocks that run together then read GROUP row strips and a few column strips, which stay in L2.
    """
    group = place // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    inside = place % (GROUP * columns)
    return group * GROUP + inside % height, inside // height


@triton.jit
def to_bfloat16(x):
    """float32 rounded to the nearest bfloat16, ties to even, as its 16 bits: the interpreter's own cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded)


@triton.jit
def store_rounded(to, offsets, x, mask, TO_BF16: tl.constexpr):
    """Write float32 in the dtype of `to`; with TO_BF16 as bits, see `as_bits`."""
    if TO_BF16:
        tl.store(to + offsets, to_bfloat16(x).to(tl.int16), mask=mask)
    else:
        tl.store(to + offsets, x.to(to.dtype.element_ty), mask=mask)


def as_bits(out: Tensor) -> Tensor:
    """Memory that `store_rounded` writes to: the tensor itself, or bfloat16 as int16."""
    return out.view(torch.int16) if out.dtype == torch.bfloat16 else out


@triton.jit
def word_places(BLOCK: tl.constexpr):
    """Words of 32 flags of a program that works on BLOCK elements, and [words, 32] offsets of the elements."""
    word = tl.program_id(0).to(tl.int64) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    return word, word[:, None] * 32 + tl.arange(0, 32)[None, :]


def words_of(bits: Tensor) -> Tensor:
    """Masks [T, bytes] as words of 32 flags: element i is bit i % 32 of word i // 32."""
    return bits.view(torch.int32) if bits.numel() else bits.to(torch.int32)  # nothing has strides that do not divide
