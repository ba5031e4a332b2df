"""Tensors of a base to which products of two small factors are added, made when they are read, row by row."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from pymerge.adapters.decoders import OfAdapter
from pymerge.adapters.factors import Loader, Matrix
from pymerge.checkpoint.decoded import CHUNK_ELEMENTS, DecodedEntry, ReadRows
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    from pymerge.adapters.products import Array


@dataclass(frozen=True, slots=True)
class Term:
    """`scale` x `left` @ `right`, added to the rows from `first` on of the tensor, or of matrix `number` of a stack."""

    left: Matrix
    right: Matrix
    scale: float
    first: int = 0
    number: int = 0

    @property
    def rank(self) -> int:
        return self.right.shape[0]


class _Kept:
    """Norms of columns, once they are known: they follow from all rows."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.columns: Array | None = None


@dataclass(frozen=True)
class Magnitude:
    """Lengths that DoRA gives to all rows of a matrix, as it is stored, or to all columns."""

    entry: TensorEntry
    of_rows: bool = True
    kept: _Kept = field(default_factory=_Kept, compare=False, repr=False)


@dataclass(frozen=True)
class LowRank(OfAdapter):
    """W_0 + the sum of all terms, rows and columns of a stored tensor (of `stacked` ones of each of its matrices).

    A tensor of more axes counts as a matrix with its first axis as rows. With a `magnitude`, rows or columns of the
    sum are then given these lengths.
    """

    base: TensorEntry
    terms: tuple[Term, ...]
    stacked: bool = False
    magnitude: Magnitude | None = None

    @property
    def kind(self) -> str:
        return f"rank {self.rank}" + (", DoRA" if self.magnitude else "")

    @property
    def rank(self) -> int:
        """The largest rank of what is added to a matrix."""
        ranks: dict[int, int] = {}
        for term in self.terms:
            ranks[term.number] = ranks.get(term.number, 0) + term.rank
        return max(ranks.values())

    @property
    def needs_torch(self) -> bool:
        return self.magnitude is not None and self.magnitude.of_rows

    @cached_property
    def parts(self) -> tuple[TensorEntry, ...]:
        factors = [side.entry for term in self.terms for side in (term.left, term.right)]
        lengths = [self.magnitude.entry] if self.magnitude else []
        return (self.base, *dict.fromkeys([*factors, *lengths]))

    @cached_property
    def _numbered(self) -> dict[int, list[Term]]:
        found: dict[int, list[Term]] = {}
        for term in self.terms:
            found.setdefault(term.number, []).append(term)
        return found

    def _of(self, number: int) -> Sequence[Term]:
        """The terms of a matrix of a stack; of one that is none, all."""
        return self._numbered.get(number, ()) if self.stacked else self.terms

    @property
    def plain(self) -> bool:
        """Whether it is the base plus one product, of all rows."""
        rows = self.base.shape[0]
        whole = all(term.first == 0 and term.left.shape[0] == rows for term in self.terms)
        return whole and not self.stacked and self.magnitude is None

    def rights(self, read: ReadRows) -> Iterator[Array]:
        """Right factors of a plain one, r x columns, in the dtype of the sum: R rows one above the other."""
        return (Loader(read, self._kind).values(term.right) for term in self.terms)

    def left(self, read: ReadRows, start: int, stop: int) -> tuple[Array, float]:
        """Left factors of a plain one side by side, these rows of them, in the dtype of the sum, and a scale.

        The product of one term is scaled as PEFT scales it, at the end; those of several are by their left factors.
        """
        import numpy as np

        if len(self.terms) == 1:
            return Loader(read, self._kind).some(self.terms[0].left, start, stop), self.terms[0].scale
        joined: Array = np.empty((stop - start, self.rank), self._kind)
        at = 0
        for term in self.terms:
            loader = Loader(read, self._kind)  # which keeps what it has read
            place = joined[:, at : at + term.rank]
            np.multiply(loader.some(term.left, start, stop), loader.kind(term.scale), out=place)
            at += term.rank
        return joined, 1.0

    def product_bytes(self, rows: int) -> int:
        """Bytes that the right factors and so many rows of the left ones take, with what is made of them on the way."""
        columns = math.prod(self.base.shape[1:])
        widest = max(term.right.entry.nbytes + ITEM_SIZES[self.dtype] * term.right.numel for term in self.terms)
        return ITEM_SIZES[self.dtype] * self.rank * (columns + 3 * rows + 96) + widest

    @property
    def _kind(self) -> type:
        import numpy as np

        return np.float64 if self.dtype == "F64" else np.float32

    def rank_of(self, number: int = 0) -> int:
        """The rank of all that is added to a matrix."""
        return sum(term.rank for term in self._of(number))

    @property
    def exact_in_single(self) -> bool:
        """Whether float32 holds the factors with their scales: of float32 or less, and scaled by powers of two."""
        return self.dtype != "F64" and all(math.frexp(abs(term.scale))[0] in (0.0, 0.5) for term in self.terms)

    def factors(self, read: ReadRows, number: int = 0, *, double: bool = True) -> tuple[Array, Array]:
        """All that is added to a matrix as left (rows x R) @ right (R x columns), scales in `left`; in float64, or in
        float32 where that is as exact."""
        import numpy as np

        kind = np.float64 if double or not self.exact_in_single else np.float32
        loader = Loader(read, kind)
        rows = self.base.shape[-2] if self.stacked else self.base.shape[0]
        terms = self._of(number)
        left, at = np.zeros((rows, self.rank_of(number)), kind), 0
        for term in terms:
            block = loader.values(term.left)
            np.multiply(block, kind(term.scale), out=left[term.first : term.first + len(block), at : at + term.rank])
            at += term.rank
        rights = [loader.values(term.right) for term in terms]
        width = self.base.shape[-1] if self.stacked else math.prod(self.base.shape[1:])
        if len(rights) == 1:
            return left, rights[0]
        return left, np.concatenate(rights) if rights else np.zeros((0, width), kind)

    def fill(self, read: ReadRows, out: Array, start: int, stop: int) -> None:
        loader = Loader(read, out.dtype.type)
        if self.stacked:
            for number in range(start, stop):
                matrix = out[number - start]
                loader.fill(matrix, self.base, number, number + 1)
                for product in _products(loader, self._of(number), len(matrix), kept=True):
                    _add(loader, product, matrix, 0)
            return
        width = math.prod(self.base.shape[1:])
        flat = out.reshape(stop - start, width)
        products = _products(loader, self.terms, self.base.shape[0])
        step = max(1, CHUNK_ELEMENTS // max(1, width))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            self._fill_rows(loader, products, flat[first - start : last - start], first)

    def decode(self, read: ReadRows, out: Array, start: int, stop: int) -> None:
        self.fill(read, out, start, stop)

    def _fill_rows(self, loader: Loader, products: list[_Product], out: Array, start: int) -> None:
        import numpy as np

        from pymerge.adapters.products import row_norms

        self._fill_sums(loader, products, out, start)
        if self.magnitude is None:
            return
        lengths = loader.flat(self.magnitude.entry)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.magnitude.of_rows:
                out *= (lengths[start : start + len(out)] / row_norms(out))[:, None]
            else:
                out *= (lengths / self._column_norms(loader, products, self.magnitude.kept))[None, :]

    def _fill_sums(self, loader: Loader, products: list[_Product], out: Array, start: int) -> None:
        """W_0 and all terms, rows from `start` on."""
        loader.fill(out, self.base, start, start + len(out))
        for product in products:
            _add(loader, product, out, start)

    def _column_norms(self, loader: Loader, products: list[_Product], kept: _Kept) -> Array:
        import numpy as np

        from pymerge.adapters.products import add_column_squares

        with kept.lock:
            if kept.columns is None:
                rows, width = self.base.shape[0], math.prod(self.base.shape[1:])
                step = max(1, CHUNK_ELEMENTS // max(1, width))
                squares: Array = np.zeros(width, loader.kind)
                for first in range(0, rows, step):
                    block: Array = np.empty((min(step, rows - first), width), loader.kind)
                    self._fill_sums(loader, products, block, first)
                    add_column_squares(squares, block)
                kept.columns = np.sqrt(squares)
            return kept.columns

    def scratch(self, elements: int) -> int:
        size = ITEM_SIZES[self.dtype]
        base = min(elements, max(CHUNK_ELEMENTS, math.prod(self.base.shape[1:]))) * (ITEM_SIZES[self.base.dtype] + size)
        nested = self.base.decoding_bytes
        if self.stacked:
            whole = sum(part.numel for part in self.parts[1:]) * 2 * size
            picked = max(term.left.numel + term.right.numel for term in self.terms) * size
            return base + nested + whole + picked
        rights = 2 * sum(term.right.numel for term in self.terms) * size
        width = max(1, math.prod(self.base.shape[1:]))
        rows = CHUNK_ELEMENTS // width + 33
        lefts = sum(term.rank for term in self.terms) * min(rows, self.base.shape[0]) * 3 * size
        read = max(term.right.entry.nbytes for term in self.terms)
        again = 0 if self.magnitude is None else base
        return base + nested + rights + lefts + read + again + 2**18


@dataclass(frozen=True)
class _Product:
    """Terms of the same rows with their right factors, one above the other."""

    terms: tuple[Term, ...]
    right: Array


def _products(loader: Loader, terms: Sequence[Term], rows: int, *, kept: bool = False) -> list[_Product]:
    """The terms as few products: those of all rows in one, others each for itself."""
    import numpy as np

    whole = tuple(term for term in terms if term.first == 0 and term.left.shape[0] == rows)
    alone = [term for term in terms if term not in whole]
    groups = [*([whole] if whole else []), *((term,) for term in alone)]
    found = []
    for group in groups:
        rights = [loader.values(term.right, kept=kept) for term in group]
        found.append(_Product(group, rights[0] if len(rights) == 1 else np.concatenate(rights)))
    return found


def _add(loader: Loader, product: _Product, out: Array, start: int) -> None:
    """Add a product to rows of its matrix, from `start` on."""
    import numpy as np

    from pymerge.adapters.products import TILE_ROWS, add_product

    term = product.terms[0]
    rows = term.left.shape[0]
    first, last = max(start - term.first, 0), min(start + len(out) - term.first, rows)
    if first >= last:
        return
    top, end = first // TILE_ROWS * TILE_ROWS, min(-(-last // TILE_ROWS) * TILE_ROWS, rows)
    left, scale = loader.some(term.left, top, end), term.scale
    if len(product.terms) > 1:
        scaled = [loader.some(each.left, top, end) * loader.kind(each.scale) for each in product.terms]
        left, scale = np.concatenate(scaled, axis=1), 1.0
    at = term.first - start
    add_product(out[at + first : at + last], left, product.right, scale, first - top)


def low_rank_of(entry: TensorEntry) -> LowRank | None:
    """The decoder of a whole tensor to which factors are added; None for any other entry."""
    if not isinstance(entry, DecodedEntry) or not isinstance(entry.decoder, LowRank):
        return None
    return entry.decoder if entry.first_row == 0 and entry.shape == entry.decoder.shape else None
