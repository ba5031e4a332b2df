"""A part of one tensor in the base and all experts, and the ops on it that methods need which reduce before they merge.

Numbers that decide how a tensor is merged are numpy arrays, whatever library the elements are held in; what is as large
as the elements (masks, results) stays with that library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.common.shapes import Axis

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Elements of one call of `combine` on tensors of PyTorch: its scratch stays small however large the part is.
SUM_ELEMENTS = 2**20


class Kept(NamedTuple):
    """Masks of a part, and the L1 norms of its T task vectors."""

    bits: Any  # of the part's library: a bit an element, as in pymerge.ops._bitmask
    before: NDArray[Any]  # [T] float64; of any content where nobody asked for norms
    after: NDArray[Any]  # [T] float64, over what is kept


class Limits(NamedTuple):
    """Of T task vectors, the magnitudes that are selected: as `Thresholds`, of the op trim_threshold."""

    keys: Sequence[int]
    ends: Sequence[int]


class Between(NamedTuple):
    """A mask: what `kept` selects of each task vector without what `dropped` selects."""

    kept: Limits
    dropped: Limits | None


class Models(NamedTuple):
    """Which vectors an op is about: the experts, with the base as one more before them, or less the base."""

    with_base: bool = False
    on_base: bool = False


class Part(ABC):
    """Rows of one tensor, from element `first` on; `row` is how many of them come before.

    Magnitudes are ordered by integers, their keys, of `key_bits` bits.
    """

    key_bits = 31

    def __init__(self, first: int, row: int, shape: tuple[int, ...]) -> None:
        self.first = first
        self.row = row
        self.shape = shape

    @abstractmethod
    def trim_threshold(self, counts: Sequence[int]) -> Limits:
        """Where the largest elements of each task vector end."""

    @abstractmethod
    def magnitude_counts(self, tasks: Sequence[int], prefixes: Sequence[int], shift: int, bits: int) -> NDArray[Any]:
        """How many magnitudes of these tasks have each value of a digit, [len(tasks), 2^bits] int64."""

    @abstractmethod
    def behind(self, task: int, key: int, count: int) -> int:
        """The index, in this part, behind the count-th element with this key."""

    @abstractmethod
    def magnitude_mask(self, between: Between) -> Kept:
        """What lies between these limits, as bits."""

    @abstractmethod
    def random_mask(
        self, lowest: Sequence[float], highest: Sequence[float], keys: Sequence[int], *, norms: bool
    ) -> Kept:
        """What is drawn with these probabilities."""

    @abstractmethod
    def join(self, bits: Sequence[Any]) -> Any:
        """The bits of this part, from those of the parts that it consists of."""

    @abstractmethod
    def sparse_combine(
        self,
        weights: Sequence[float],
        *,
        mask: Any,
        factors: Sequence[float],
        elect: bool,
        normalize: bool,
        scale: float,
    ) -> Any:
        """The merged part: the sum of what `mask`, bits or Between, keeps."""

    @abstractmethod
    def task_dots(self, models: Models, axis: Axis) -> NDArray[Any]:
        """Inner products, [G, T, T] float64."""

    @abstractmethod
    def combine(self, models: Models, weights: Sequence[float]) -> Any:
        """The merged part: a weighted sum.

        Two weights of models themselves that add up to 1 go from the nearer one: equal models, and weights of 0 and 1,
        then give the very values of a model.
        """

    @abstractmethod
    def combine_vectors(self, models: Models, weights: NDArray[Any], axis: Axis) -> Any:
        """The merged part: a weighted sum with weights [G, T] of each vector."""

    @abstractmethod
    def nonzero(self) -> int:
        """How many elements of the first task vector are not 0."""

    @abstractmethod
    def spread(self) -> Part:
        """The variances of the task vectors at each element, as the only task vector of a part."""

    @abstractmethod
    def energies(self, bits: Any) -> NDArray[Any]:
        """Sums of squares [T] float64, over the elements whose bits are set (None: all)."""

    @abstractmethod
    def majority_mean(self, weights: Sequence[float], bits: Any, least: float) -> Any:
        """The merged part, by the op sce: bits as for `energies`."""

    @abstractmethod
    def active_counts(self, epsilon: float) -> NDArray[Any]:
        """Elements where each task vector alone is active, and where another is too, [T, 2] int64."""

    @abstractmethod
    def mean_of_active(self, epsilon: float, factors: Sequence[float]) -> Any:
        """The merged part, by the op ram."""

    @abstractmethod
    def divergence(self) -> NDArray[Any]:
        """Of the first expert's rows from the base's, [rows] float64."""

    @abstractmethod
    def importance(self, divergence: NDArray[Any], times: int) -> Part:
        """The importance of the first expert's elements, as so many equal task vectors of a part."""

    @abstractmethod
    def take_important(self, divergence: NDArray[Any], least: float) -> Any:
        """The merged part, by the op arcee_fusion."""


def from_the_nearer(models: Models, weights: Sequence[float]) -> int | None:
    """The number of the model that a sum starts at, where it is one of two; None where it does not."""
    if models.on_base or len(weights) != 2 or sum(weights) != 1.0:
        return None
    return 0 if weights[0] >= weights[1] else 1
