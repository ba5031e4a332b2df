# csrc/bindings for NVIDIA devices; conventions as in _C.pyi, streams as integers.
from collections.abc import Sequence

# Address, dtype code, strides of rows and of layers in elements.
_Layers = tuple[int, int, int, int]

def build_info() -> str: ...
def combine(
    out: int,
    out_dtype: int,
    base: int,
    base_dtype: int,
    inputs: Sequence[int],
    dtypes: Sequence[int],
    weights: Sequence[float],
    divisor: float,
    numel: int,
    stream: int,
    /,
) -> None: ...
def task_gram(
    out: int,
    base: _Layers,
    experts: Sequence[_Layers],
    weights: int,
    means: int,
    layers: int,
    rows: int,
    columns: int,
    stream: int,
    /,
) -> None: ...
def wudi_adam(
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
def spd_solve(
    X: int,
    conditions: int,
    minors: int,
    S: int,
    R: int,
    prior: int,
    start: int,
    dtype: int,
    layers: int,
    rows: int,
    columns: int,
    iterations: int,
    stream: int,
    /,
) -> None: ...
def trim_threshold(
    keys: int,
    ends: int,
    scratch: int,
    base: tuple[int, int, int],
    experts: Sequence[tuple[int, int, int]],
    counts: Sequence[int],
    numel: int,
    stream: int,
    /,
) -> None: ...
def trim_threshold_scratch(count: int, numel: int, /) -> int: ...
def spd_solve_columns(dtype: int, /) -> int: ...
