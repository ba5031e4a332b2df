"""Actions: what is done to one tensor, of five kinds. Combine is data; the others say what to run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from pymerge.common.arrays import ArrayLike
from pymerge.ops import combine as sums
from pymerge.ops._op import Op

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.deltas import Delta
    from pymerge.methods.core.factors import Factors
    from pymerge.methods.rows import Rows

Result = TypeVar("Result")

# Elements of the rows that a product is added to at once, and the fewest rows: for each of them its right factor comes
# from further away than the cache that they lie in.
TILE_ELEMENTS = 2**18
# Why a weight without factors cannot be merged by what all layers tell together, with the remedy.
WHOLE_MODEL = (
    "scope: model is one threshold for all layers, found by factors of adapters; give scope: layer, or adapters alone"
)
TILE_ROWS = 128
# A product d_out x d_in x d_in from which on its threads wait for each other for little of the time.
_FILLING_FLOPS = 2**33


class Run(Protocol):
    """Runs an op on the chosen backend (pymerge.backends.runner)."""

    def __call__(self, op: Op[Result], /) -> Result: ...


class Action(ABC):
    """Work on one tensor. Frozen dataclasses: equal actions do the same."""

    @property
    def label(self) -> str:
        """Its name for people."""
        raise NotImplementedError

    @property
    def shows_nonfinite(self) -> bool:
        """Whether NaN or infinity in an input is NaN or infinity in the result: then the result alone is looked at."""
        return False

    @abstractmethod
    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        """Floating-point operations on a tensor of this shape, a multiply-add counted as two."""

    def of_inputs(self, dtypes: Collection[str]) -> Action:
        """The action as it computes with inputs of these dtypes, for its `scratch`."""
        return self

    @abstractmethod
    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs and output that a piece of this shape needs: in native code on arrays, or on tensors."""

    @property
    def beforehand(self) -> int:
        """Number of times that all tensors with such an action are read before one is merged, for what they tell."""
        return 0

    @property
    def minds_delta_size(self) -> bool:
        """Whether `remark` has something to say for some sizes: then a few rows are read when the plan is made."""
        return False

    def remark(self, delta_rms: float, norms: Sequence[float]) -> str | None:
        """Advice to a user who would merge deltas of this root mean square, with the remedy; `norms`: about the squared
        norms of a matrix's deltas, of the tasks that touched it.
        """
        return None


@dataclass(frozen=True)
class Combine(Action):
    """(sum_t w_t W_t) / divisor, or W_0 + (sum_t w_t tau_t) / divisor `on_base`; on any rows of a tensor.

    Without weights it copies the only tensor that is read, bit for bit where the dtype stays.
    """

    weights: tuple[float, ...] = ()
    divisor: float = 1.0
    on_base: bool = False
    label: str = "weighted sum"

    def op(self, rows: Rows) -> sums.Combine:
        """The op; only of actions with weights."""
        base = rows.base if self.on_base else None
        return sums.Combine(base, rows.experts, self.weights, rows.out_dtype, rows.out, self.divisor)

    @property
    def shows_nonfinite(self) -> bool:
        return all(self.weights)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return (3 if self.on_base else 2) * len(self.weights) * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return sums.Combine.scratch(shape, experts, native) if self.weights else 0


class Elementwise(Action):
    """One op, whose result at an element depends on the inputs there alone; on any rows of a tensor."""

    @abstractmethod
    def op(self, rows: Rows) -> Op[ArrayLike]:
        """The op that merges these rows."""


class Solve(Action):
    """Work on whole matrices, d_out x d_in, one of a stack after the other; on tensors of PyTorch."""

    scale: float  # of X, what is added to W_0
    bytes_beside = 0  # of files that it reads by itself, beside the tensor's inputs
    by_products: ClassVar[bool] = False  # whether products of its matrices take all of the time

    def check_shape(self, shape: tuple[int, int], experts: int) -> None:
        """Raise ArgumentError, when a merge is planned, for a matrix of a shape that it cannot solve."""

    def keep(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Kept | None:
        """Keep what merges of these matrices by this action with other parameters that may vary can be made from.

        None where there is nothing but the beginning.
        """
        return None

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Bytes of what `keep` keeps of a matrix of this shape, at most; 0 if that is nothing."""
        return 0

    @abstractmethod
    def run(self, run: Run, base: Tensor, experts: Sequence[Tensor], out_dtype: str) -> Tensor:
        """The merged matrix, in the dtype of this code."""

    def fills_cores(self, rows: int, columns: int) -> bool:
        """Whether one matrix of this shape keeps all cores of a CPU busy. LAPACK's routines, which are on one thread,
        and small products don't: such matrices are solved side by side."""
        return self.by_products and 2 * rows * columns**2 >= _FILLING_FLOPS

    @property
    def has_core(self) -> bool:
        """Whether it can be solved in the space that factors span: by `run_core`, for `InCore`."""
        return False

    @property
    def minds_factors(self) -> bool:
        """Whether it is defined by factors: then those that are known are taken whatever their rank."""
        return False

    @property
    def needs_outputs(self) -> bool:
        """Whether its core takes rows of outputs, and so no weights that are stored d_in x d_out."""
        return False

    def run_core(self, tasks: Sequence[Factors]) -> Delta:
        """scale * X from task vectors that are products of factors (finite, of one shape), in `one_blas_thread`."""
        raise NotImplementedError(f"{self.label} has no form for factors")

    @property
    def of_model(self) -> bool:
        """Whether a matrix is merged by what all matrices with this very action tell: by what `together` gives."""
        return False

    def together(self, run: Run, matrices: Sequence[Callable[[], Sequence[Factors]]], tasks: int) -> list[Solve]:
        """This action for each of these matrices, with what all of them tell.

        Args:
            matrices: give the factors of all tasks, the same each time, in the order of the weights' names.
        """
        raise NotImplementedError(f"{self.label} merges each matrix by itself")

    def core_remark(self, shape: tuple[int, int], rank: int) -> str | None:
        """Remark for users on this merge of factors of rank R together, with the remedy."""
        return None

    def core_scratch(self, shape: tuple[int, int], rank: int, experts: int) -> int:
        """Bytes that the core takes beside factors and cores of them, and one product for rows."""
        return 0

    def core_flops(self, shape: tuple[int, int], rank: int) -> int:
        """Operations of a matrix beside those of cores and one product."""
        return 0


class Kept(ABC):
    """Memory of a solver about one matrix, for merges with other parameters that may vary.

    It never changes: what a merge gives does not depend on those before it.
    """

    kind: ClassVar[str]  # for people

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in memory."""

    @abstractmethod
    def merge(self, action: Solve, base: Tensor, out_dtype: str) -> Tensor:
        """The merged matrix, d_out x d_in, by an action that differs from the one before in what may vary alone."""


class SolveTogether(Solve):
    """Work on matrices that is cheaper for several of one shape at once."""

    @abstractmethod
    def run_batch(
        self, run: Run, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], out_dtype: str
    ) -> list[Tensor]:
        """The merged matrices of L layers, each what `run` gives, bit for bit.

        Args:
            bases: L matrices W_0 of one shape, dtype and device.
            experts: for each of them its T matrices W_t, task t of the same dtype in all layers.
        """

    def run(self, run: Run, base: Tensor, experts: Sequence[Tensor], out_dtype: str) -> Tensor:
        return self.run_batch(run, [base], [experts], out_dtype)[0]


@dataclass(frozen=True)
class InCore(Action):
    """A Solve whose task vectors are products of factors: W_0 + P K on any rows, P and K from the factors alone."""

    solve: Solve
    shape: tuple[int, int]  # d_out x d_in of a matrix
    rank: int  # R, that of all factors of a matrix together

    @property
    def label(self) -> str:
        return self.solve.label

    @property
    def shows_nonfinite(self) -> bool:
        return True  # the factors are looked at by themselves

    @property
    def minds_delta_size(self) -> bool:
        return self.solve.minds_delta_size

    def remark(self, delta_rms: float, norms: Sequence[float]) -> str | None:
        return self.solve.remark(delta_rms, norms)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        (rows, columns), rank, elements = self.shape, self.rank, math.prod(shape)
        core = 4 * (rows + columns) * rank**2 + 30 * rank**3 + self.solve.core_flops(self.shape, rank)
        return 2 * elements * rank + core * elements // max(1, rows * columns)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        # Factors as they are read, joined and orthonormal, P and K; cores; and a product for some rows, in float64.
        rows, columns = self.shape
        tile = max(columns, rows, min(max(TILE_ELEMENTS, TILE_ROWS * max(rows, columns)), math.prod(shape)))
        elements = 6 * (rows + columns) * self.rank + 12 * self.rank**2 + 2 * tile
        return 8 * elements + self.solve.core_scratch(self.shape, self.rank, experts)


class Encode(Action):
    """Work on a tensor, or on rows of it, that gives others, whose sizes may depend on the values: what lies beside a
    model (`Extras` of a plan), or numbers about it.

    On tensors of PyTorch on the CPU, by a thread of its own: the results do not depend on how many there are.
    """

    @abstractmethod
    def run(self, inputs: Sequence[Tensor], first_row: int) -> dict[str, Tensor]:
        """The tensors that are written, by their names, from all that are read, the base first: their rows from
        `first_row` on.

        Raises NonFiniteError, which names file and tensor, for what must not be written.
        """


def copy() -> Combine:
    """The base's tensor as it is."""
    return Combine(on_base=True, label="copy")


def scaled(factor: float = 1.0) -> Combine:
    """The only model, times a number; with 1, bit for bit."""
    return Combine(() if factor == 1.0 else (factor,), label="scale")


def add_task_vectors(weights: Sequence[float], divisor: float = 1.0) -> Combine:
    """W_0 + (sum_t w_t tau_t) / divisor."""
    return Combine(tuple(weights), divisor, on_base=True, label="add task vectors")


def mean_of_tasks(experts: int) -> Combine:
    """W_0 + (1/T) sum_t tau_t, the average of the fine-tuned weights."""
    return add_task_vectors((1.0,) * experts, float(experts))
