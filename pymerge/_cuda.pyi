# csrc/bindings for NVIDIA devices; conventions as in _C.pyi, the last argument of a function is its stream.
from collections.abc import Sequence

from pymerge._C import Matrix

# The matrices of a batch: address, dtype code, strides of rows and of layers in elements.
Layers = tuple[int, int, int, int]

def build_info() -> str: ...
def combine(
    out: Matrix,
    base: Matrix | None,
    tensors: Sequence[Matrix],
    weights: Sequence[float],
    divisor: float,
    stream: int,
    /,
) -> None: ...
def task_gram(  # out, weights (layers x T) and means (layers x T x columns) float32
    out: int,
    base: Layers,
    experts: Sequence[Layers],
    weights: int,
    means: int,
    layers: int,
    rows: int,
    columns: int,
    stream: int,
    /,
) -> None: ...
def wudi_adam(  # float32, but lr (layers) float64
    D: int,
    other: int,
    m: int,
    v: int,
    A: int,
    B: int,
    lr: int,
    layers: int,
    rows: int,
    columns: int,
    iterations: int,
    beta1: float,
    beta2: float,
    eps: float,
    stream: int,
    /,
) -> None: ...
def spd_solve(  # all as one row, in one dtype, as the conditions are; minors int32
    X: Matrix,
    conditions: int,
    minors: int,
    S: Matrix,
    R: Matrix,
    prior: Matrix | None,
    start: Matrix,
    layers: int,
    rows: int,
    columns: int,
    iterations: int,
    stream: int,
    /,
) -> None: ...
def trim_threshold(  # keys and ends int64; scratch of trim_threshold_scratch() bytes, zeros
    keys: int,
    ends: int,
    scratch: int,
    base: Matrix,
    experts: Sequence[Matrix],
    counts: Sequence[int],
    stream: int,
    /,
) -> None: ...
def trim_threshold_scratch(count: int, numel: int, /) -> int: ...
def spd_solve_columns(dtype: int, /) -> int: ...
