"""Parts in plain memory give what parts of PyTorch tensors give with the C++ backend, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pymerge.engine.raw_parts import Raw, RawPart
from pymerge.methods.parts import Between, Limits, Models
from pymerge.methods.tensor_parts import TensorPart
from torch import Tensor

from pymerge.backends.native import DTYPE_CODES
from pymerge.backends.runner import Runner

SHAPES = [(), (1,), (77,), (33, 65), (64, 128), (3, 5, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEPT = {"factors": [1.0, 0.5], "elect": True, "normalize": True, "scale": 0.7}


def raw(tensor: Tensor) -> Raw:
    return Raw(tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.numel())


@pytest.fixture(params=[(shape, dtype) for shape in SHAPES for dtype in DTYPES], ids=str)
def parts(request: pytest.FixtureRequest) -> tuple[TensorPart, RawPart, Tensor]:
    """The same weights, with few magnitudes of the deltas, and where the second one puts results."""
    shape, dtype = request.param
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator).to(dtype)
    experts = [base + (torch.randint(-3, 4, shape, generator=generator) / 8).to(dtype) for _ in range(2)]
    out = torch.empty_like(base)
    plain = RawPart(raw(base), [raw(expert) for expert in experts], raw(out), tuple(shape), USED.add, first=128)
    # What is in memory at those addresses lives as long as this.
    return TensorPart(Runner("native"), base, experts, dtype, first=128), plain, out


USED: set[str] = set()


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def merged(out: Tensor, result: Tensor | None) -> Tensor:
    """What a part gives, or has put into `out`."""
    return out.clone() if result is None else result


def test_masks_and_selections(parts: tuple[TensorPart, RawPart, Tensor]) -> None:
    ours, plain, out = parts
    numel = out.numel()
    for count in {0, numel // 3, numel}:
        limits = ours.trim_threshold([count, numel])
        assert same(plain.trim_threshold([count, numel]), limits)
        dropped = Limits([2**31 - 1, 0], [0, numel // 2])
        for above in (None, dropped):
            between = Between(limits, above)
            masks = ours.magnitude_mask(between)
            assert same(plain.magnitude_mask(between), masks)
            for mask in (between, masks.bits.numpy()):
                assert torch.equal(
                    merged(out, ours.sparse_combine([0.3, 0.6], mask=between, **KEPT)),
                    merged(out, plain.sparse_combine([0.3, 0.6], mask=mask, **KEPT)),
                )
    for low, high in ((0.4, 0.4), (0.2, 0.6)):
        draws = ([low, 0.5], [high, 0.5], [7, 2**63 + 5])
        assert same(plain.random_mask(*draws, norms=True), ours.random_mask(*draws, norms=True))
        assert same(plain.random_mask(*draws, norms=False)[:1], ours.random_mask(*draws, norms=True)[:1])


def test_counts_and_places(parts: tuple[TensorPart, RawPart, Tensor]) -> None:
    ours, plain, out = parts
    for prefixes, shift, bits in (([0, 0], 15, 16), ([0x7C80, 0], 0, 15)):
        counts = plain.magnitude_counts([1, 0], prefixes, shift, bits)
        assert np.array_equal(counts, ours.magnitude_counts([1, 0], prefixes, shift, bits))
        assert shift == 0 or counts.sum() == 2 * out.numel()
    key = plain.trim_threshold([1, out.numel()]).keys[0] if out.numel() > 1 else 0
    ties = int(plain.magnitude_counts([0], [key], 0, 0)[0, 0])
    for count in {1, ties}:
        if 0 < count <= ties:
            assert plain.behind(0, key, count) == ours.behind(0, key, count)


def test_merges(parts: tuple[TensorPart, RawPart, Tensor]) -> None:
    ours, plain, out = parts
    for options in (KEPT, {**KEPT, "elect": False}, {**KEPT, "normalize": False}):
        found = []
        for part in (ours, plain):
            bits = part.random_mask([0.5] * 2, [0.5] * 2, [3, 4], norms=False).bits
            found.append(merged(out, part.sparse_combine([0.3, 0.6], mask=bits, **options)))
        assert torch.equal(*found)
    for models in (Models(), Models(on_base=True), Models(with_base=True)):
        dots = ours.task_dots(models, "whole")
        assert np.array_equal(plain.task_dots(models, "whole"), dots)
        for weights in ([0.25, 0.75, 0.5][: dots.shape[-1]], [1.0, 0.0, 0.0][: dots.shape[-1]]):
            assert torch.equal(*(merged(out, part.combine(models, weights)) for part in (ours, plain)))


@pytest.mark.parametrize("experts", [2, 5])
def test_selections_of_tensors_of_several_dtypes(experts: int) -> None:
    """As bits that are made first: with ends within words and blocks, of nothing, and of everything."""
    generator, numel, dtypes = torch.Generator().manual_seed(2), 3000, [torch.bfloat16, torch.float32, torch.float16]
    base = torch.randn(numel, generator=generator).bfloat16()
    deltas = [torch.randint(-3, 4, (numel,), generator=generator) / 8 for _ in range(experts)]
    tensors = [(base + delta).to(dtypes[t % 3]) for t, delta in enumerate(deltas)]
    out = torch.empty(numel)
    part = RawPart(raw(base), [raw(tensor) for tensor in tensors], raw(out), (numel,), USED.add)
    weights, options = [0.3, 0.6, -0.2, 0.5, 0.4][:experts], {**KEPT, "factors": [1.0] * experts}
    half = part.trim_threshold([numel // 2, 1, 1700, 0, numel][:experts])
    few = part.trim_threshold([0, numel, 20, 7, 900][:experts])
    for between in (Between(half, None), Between(half, few)):
        part.sparse_combine(weights, mask=part.magnitude_mask(between).bits, **options)
        expected = out.clone()
        part.sparse_combine(weights, mask=between, **options)
        assert torch.equal(out, expected)
        assert not torch.equal(out, base.float())


def test_what_is_told_of_the_ops() -> None:
    assert {"trim_threshold", "magnitude_counts", "magnitude_mask", "random_mask", "sparse_combine", "combine"} <= USED


def test_vectors_of_rows_are_not_for_plain_memory() -> None:
    tensor = torch.zeros(4, 4)
    part = RawPart(raw(tensor), [raw(tensor)], raw(tensor), (4, 4), USED.add)
    with pytest.raises(NotImplementedError, match=r"pymerge\.backends\.native"):
        part.task_dots(Models(), "rows")
    with pytest.raises(NotImplementedError, match=r"pymerge\.backends\.native"):
        part.combine_vectors(Models(), np.ones((4, 1)), "rows")
