"""random_mask with one probability a task: element i is kept where its number of Philox 4x32-10 is below a limit.

Integer arithmetic alone decides, so the masks are those of the other backends bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._common import EXPERTS, Table, Variant, word_places
from ._masks import output, store_mask, task_delta


@triton.jit
def _random_words(key, start, BLOCK: tl.constexpr):
    """The 32-bit numbers of a program's elements, [BLOCK / 32, 32]: number i is word i % 4 of counter i // 4."""
    counter = start + tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = tl.zeros((BLOCK // 4,), dtype=tl.uint32)
    first, second, third, fourth = tl.philox(key, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(words, (BLOCK // 32, 32))


@triton.jit
def random_mask_kernel(
    bits,  # [T, words] int32
    norms,  # [T, 2, programs] float64
    base,
    experts,  # tuple of T pointers, each of its own type
    keys,  # [T] int64: the bits of the keys
    limits,  # [T] int64: probabilities as multiples of 2^-32
    start,  # counter of the first element
    count,
    words,
    BLOCK: tl.constexpr,
):
    word, offsets = word_places(BLOCK)
    mask = offsets < count
    origin = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    for t in tl.static_range(len(experts)):
        delta = task_delta(experts[t], origin, offsets, mask)
        limit = tl.load(limits + t)
        drawn = _random_words(tl.load(keys + t), start, BLOCK) < limit.to(tl.uint32)
        flags = mask & (drawn | (limit >> 32 != 0))  # probability 1 has no 32-bit limit
        store_mask(bits, norms, t, word, words, flags, delta)


def launch(
    bits: Tensor, base: Tensor, experts: Sequence[Tensor], keys: Tensor, limits: Tensor, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Write the masks to `bits`, [T, 8 ceil(count / 64)] uint8, and return the L1 norms before and after, [T] float64.

    base and experts: contiguous, of `count` elements; float32, float16 or bfloat16. keys: [T] int64, the bits of
    unsigned ones. limits: [T] int64, probabilities times 2^32, rounded down. first: the number of the first element, a
    multiple of 64.
    """
    count = base.numel()
    out = output(bits, count)
    if count:
        random_mask_kernel[(out.programs,)](
            out.bits,
            out.norms,
            base,
            tuple(experts),
            keys,
            limits,
            first // 4,
            count,
            out.bits.shape[1],
            BLOCK=out.size.block,
            num_warps=out.size.warps,
        )
    before, after = out.norms.sum(-1).unbind(1)
    return before, after


def variants(table: Table) -> Iterator[Variant]:
    """Experts of all dtypes, all sizes."""
    for size in table["mask"]:
        types = {"base": "*bf16", "experts": EXPERTS, "count": "i64", "bits": "*i32", "norms": "*fp64", "words": "i64"}
        types |= {"keys": "*i64", "limits": "*i64", "start": "i64"}
        yield Variant(f"random_mask {size.block}", random_mask_kernel, types, {"BLOCK": size.block}, size)
