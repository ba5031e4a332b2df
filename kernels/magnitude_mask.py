"""magnitude_mask: masks of a range of magnitudes of each task vector and its L1 norms, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._common import EXPERTS, Table, Variant, word_places
from ._masks import output, store_mask, task_delta


@triton.jit
def _selected(key, keys, ends, task, BLOCK: tl.constexpr):
    """Whether magnitudes are above keys[task], or equal to it at an index below ends[task].

    Compared with 32 bits: no magnitude has all ones, which stands for a key that nothing reaches, and indices count
    from the first element of the program.
    """
    limit = tl.minimum(tl.load(keys + task), 0xFFFFFFFF).to(tl.uint32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    end = tl.minimum(tl.maximum(tl.load(ends + task) - start, 0), BLOCK).to(tl.int32)
    place = tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    return (key > limit) | ((key == limit) & (place < end))


@triton.jit
def magnitude_mask_kernel(
    bits,  # [T, words] int32
    norms,  # [T, 2, programs] float64
    base,
    experts,  # tuple of T pointers, each of its own type
    kept_keys,  # [T] int64, as the next three
    kept_ends,
    dropped_keys,
    dropped_ends,
    count,
    words,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    word, offsets = word_places(BLOCK)
    mask = offsets < count
    origin = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    for t in tl.static_range(len(experts)):
        delta = task_delta(experts[t], origin, offsets, mask)
        key = delta.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        flags = mask & _selected(key, kept_keys, kept_ends, t, BLOCK)
        if DROPS:
            flags = flags & (_selected(key, dropped_keys, dropped_ends, t, BLOCK) == 0)
        store_mask(bits, norms, t, word, words, flags, delta)


def launch(
    bits: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    kept: tuple[Tensor, Tensor],
    dropped: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Write the masks to `bits`, [T, 8 ceil(count / 64)] uint8, and return the L1 norms before and after, [T] float64.

    base and experts: contiguous, of `count` elements; float32, float16 or bfloat16. kept and dropped: keys and ends,
    [T] int64.
    """
    count = base.numel()
    out = output(bits, count)
    if count:
        magnitude_mask_kernel[(out.programs,)](
            out.bits,
            out.norms,
            base,
            tuple(experts),
            *kept,
            *(dropped or kept),
            count,
            out.bits.shape[1],
            DROPS=dropped is not None,
            BLOCK=out.size.block,
            num_warps=out.size.warps,
        )
    before, after = out.norms.sum(-1).unbind(1)
    return before, after


def variants(table: Table) -> Iterator[Variant]:
    """Experts of all dtypes, all sizes."""
    for size in table["mask"]:
        types = {"base": "*bf16", "experts": EXPERTS, "count": "i64", "bits": "*i32", "norms": "*fp64", "words": "i64"}
        types |= dict.fromkeys(("kept_keys", "kept_ends", "dropped_keys", "dropped_ends"), "*i64")
        constants = {"DROPS": True, "BLOCK": size.block}
        yield Variant(f"magnitude_mask {size.block}", magnitude_mask_kernel, types, constants, size)
