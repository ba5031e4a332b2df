# csrc/bindings for the CPU. Addresses are data_ptr(), dtypes the codes of pymerge.backends.native.DTYPE_CODES,
# a matrix is (address, dtype, row stride in elements), address 0 stands for None.
from collections.abc import Sequence

_Matrix = tuple[int, int, int]
# base, its dtype, experts, their dtypes, elements of each.
_Tasks = tuple[int, int, Sequence[int], Sequence[int], int]
# address, dtype
_Target = tuple[int, int]
# T dense task vectors: (address, dtype, elements between two of them, T).
_Dense = tuple[int, int, int, int]
# T sparse matrices by rows: (values, dtype, columns, columns are int32, starts, starts between two tasks, T).
_Sparse = tuple[int, int, int, bool, int, int, int]
# W_0, contiguous: (address, dtype, rows, columns).
_Weight = tuple[int, int, int, int]

# descriptor, byte of its first element, dtype.
_File = tuple[int, int, int]

# Bits, L1 norms before and after; keys and ends of thresholds, 0 and 0 for none. Weights are one row of all elements.
_Masks = tuple[int, int, int]
_Thresholds = tuple[int, int]

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
    threads: int,
    /,
) -> None: ...
def combine_files(
    out: int,
    out_dtype: int,
    base: _File | None,
    inputs: Sequence[_File],
    weights: Sequence[float],
    divisor: float,
    numel: int,
    block: int,
    check_inputs: bool,
    /,
) -> tuple[bool, int, int, int, int]: ...
def is_finite(values: int, dtype: int, numel: int, /) -> bool: ...
def task_sum(
    out: int,
    dtype: int,
    base: _Matrix,
    experts: Sequence[_Matrix],
    weights: Sequence[float],
    means: int,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def task_stats(
    norms: int,
    traces: int,
    means: int,
    base: _Matrix,
    experts: Sequence[_Matrix],
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def trim_threshold(
    keys: int, ends: int, base: _Matrix, experts: Sequence[_Matrix], counts: Sequence[int], numel: int, threads: int, /
) -> None: ...
def magnitude_counts(
    counts: int,
    base: _Matrix,
    experts: Sequence[_Matrix],
    prefixes: Sequence[int],
    shift: int,
    bits: int,
    numel: int,
    threads: int,
    /,
) -> None: ...
def magnitude_place(base: _Matrix, expert: _Matrix, key: int, left: int, numel: int, /) -> int: ...
def magnitude_mask(
    out: _Masks,
    base: _Matrix,
    experts: Sequence[_Matrix],
    kept: _Thresholds,
    dropped: _Thresholds,
    numel: int,
    threads: int,
    /,
) -> None: ...
def random_mask(
    out: _Masks,
    base: _Matrix,
    experts: Sequence[_Matrix],
    lowest: Sequence[float],
    highest: Sequence[float],
    keys: Sequence[int],
    first: int,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def sparse_combine(
    out: int,
    out_dtype: int,
    base: _Matrix,
    experts: Sequence[_Matrix],
    bits: int,
    kept: _Thresholds,
    dropped: _Thresholds,
    sizes: Sequence[float],
    weights: Sequence[float],
    numel: int,
    elect: bool,
    normalize: bool,
    scale: float,
    threads: int,
    /,
) -> None: ...
def task_dots(
    out: int,
    base: int,
    base_dtype: int,
    inputs: Sequence[int],
    dtypes: Sequence[int],
    vectors: int,
    length: int,
    threads: int,
    /,
) -> None: ...
def nearswap(out: _Target, tasks: _Tasks, t: float, least: float, threads: int, /) -> None: ...
def ram(out: _Target, tasks: _Tasks, epsilon: float, factors: Sequence[float], threads: int, /) -> None: ...
def ram_counts(counts: int, tasks: _Tasks, epsilon: float, threads: int, /) -> None: ...
def sce_spread(out: int, tasks: _Tasks, threads: int, /) -> None: ...
def sce_energies(energies: int, tasks: _Tasks, selected: int, threads: int, /) -> None: ...
def sce(
    out: _Target, tasks: _Tasks, selected: int, weights: Sequence[float], least: float, threads: int, /
) -> None: ...
def row_divergence(divergence: int, tasks: _Tasks, rows: int, columns: int, threads: int, /) -> None: ...
def importance(out: int, tasks: _Tasks, divergence: int, rows: int, columns: int, threads: int, /) -> None: ...
def arcee_fusion(
    out: _Target, tasks: _Tasks, divergence: int, least: float, rows: int, columns: int, threads: int, /
) -> None: ...
def adam_step(
    D: int,
    m: int,
    v: int,
    product: int,
    B: int,
    dtype: int,
    numel: int,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    lr: float,
    eps: float,
    threads: int,
    /,
) -> None: ...
def mix_dense(
    out: int,
    out_dtype: int,
    base: int,
    base_dtype: int,
    gates: int,
    tasks: _Dense,
    samples: int,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def mix_sparse(
    out: int,
    out_dtype: int,
    base: int,
    base_dtype: int,
    gates: int,
    tasks: _Sparse,
    samples: int,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def dots_dense(out: int, delta: int, numel: int, tasks: _Dense, threads: int, /) -> None: ...
def dots_sparse(out: int, delta: int, rows: int, columns: int, tasks: _Sparse, threads: int, /) -> None: ...
def add_sparse_products(
    y: int,
    y_stride: int,
    x: int,
    gates: int,
    tokens: int,
    rows: int,
    columns: int,
    tasks: _Sparse,
    threads: int,
    /,
) -> None: ...
def routed_product(
    y: int,
    x: int,
    ends: list[int],
    gates: int,
    bias: int,
    transposed: bool,
    weight: _Weight,
    tasks: _Dense | _Sparse,
    lanes: int,
    threads: int,
    /,
) -> None: ...
def routed_gates(
    out: int,
    dy: int,
    x: int,
    ends: list[int],
    weight: _Weight,
    tasks: _Dense | _Sparse,
    lanes: int,
    threads: int,
    /,
) -> None: ...
def routed_lanes() -> list[int]: ...
