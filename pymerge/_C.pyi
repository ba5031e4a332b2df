# csrc/bindings for the CPU. Every function writes to memory of the caller's, which has to live until it returns.
#
# A tensor is (address, dtype code, row stride in elements); one that is seen as one row, contiguous, has its number of
# elements there. Codes are those of csrc/common/dtype.h. Memory whose dtype a function fixes is an address, 0 for none.
from collections.abc import Sequence

Matrix = tuple[int, int, int]
# Part of an open file: descriptor, byte of the first element, dtype code.
File = tuple[int, int, int]
# Addresses: bits, one row of each task; float64 L1 norms before and after, or 0 and 0.
Masks = tuple[int, int, int]
# Addresses of int64, one of each task: keys, and the ends of those that equal them.
Thresholds = tuple[int, int]
# T dense task vectors: (address, dtype code, elements between two of them, T).
Dense = tuple[int, int, int, int]
# T sparse matrices by rows: (values, dtype code, columns, columns are int32, starts, starts between two tasks, T).
Sparse = tuple[int, int, int, bool, int, int, int]

def build_info() -> str: ...

# csrc/bindings/dense.cpp
def combine(
    out: Matrix,
    base: Matrix | None,
    tensors: Sequence[Matrix],
    weights: Sequence[float],
    divisor: float,
    threads: int,
    /,
) -> None: ...
def combine_files(
    out: Matrix,
    base: File | None,
    tensors: Sequence[File],
    weights: Sequence[float],
    divisor: float,
    block: int,
    check_inputs: bool,
    /,
) -> tuple[bool, int, int, int, int]: ...
def part_digests(digests: int, data: int, nbytes: int, part: int, /) -> int: ...
def combine_vectors(  # weights float64, T x columns or T x rows
    out: Matrix,
    base: Matrix | None,
    tensors: Sequence[Matrix],
    weights: int,
    by_columns: bool,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def is_finite(tensor: Matrix, /) -> bool: ...
def low_rank_sum(  # each of one row; factors float32 or float64, the right one in panels of 32 columns
    out: Matrix,
    base: Matrix,
    left: Matrix,
    panels: Matrix,
    scale: float,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def task_sum(  # out contiguous; means T x columns in its dtype
    out: Matrix,
    base: Matrix,
    experts: Sequence[Matrix],
    weights: Sequence[float],
    means: int,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def task_stats(  # norms and traces float64, means float32
    norms: int,
    traces: int,
    means: int,
    base: Matrix,
    experts: Sequence[Matrix],
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def task_dots(  # out float64, vectors x T x T
    out: int, base: Matrix | None, tensors: Sequence[Matrix], vectors: int, length: int, threads: int, /
) -> None: ...
def wudi_adam_step(
    D: Matrix,
    m: Matrix,
    v: Matrix,
    product: Matrix,
    B: Matrix,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    lr: float,
    eps: float,
    threads: int,
    /,
) -> None: ...

# csrc/bindings/sparse.cpp: without a base the experts themselves are the task vectors.
def trim_threshold(  # keys and ends int64
    keys: int, ends: int, base: Matrix | None, experts: Sequence[Matrix], counts: Sequence[int], threads: int, /
) -> None: ...
def magnitude_counts(  # counts int64, T x 2^bits, zeros at first
    counts: int,
    base: Matrix | None,
    experts: Sequence[Matrix],
    prefixes: Sequence[int],
    shift: int,
    bits: int,
    in_double: bool,
    threads: int,
    /,
) -> None: ...
def magnitude_place(base: Matrix | None, expert: Matrix, key: int, left: int, /) -> int: ...
def magnitude_mask(
    out: Masks,
    base: Matrix | None,
    experts: Sequence[Matrix],
    kept: Thresholds | None,
    dropped: Thresholds | None,
    threads: int,
    /,
) -> None: ...
def random_mask(
    out: Masks,
    base: Matrix | None,
    experts: Sequence[Matrix],
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
    out: Matrix,
    base: Matrix,
    experts: Sequence[Matrix],
    bits: int,
    kept: Thresholds | None,
    dropped: Thresholds | None,
    sizes: Sequence[float],
    weights: Sequence[float],
    elect: bool,
    normalize: bool,
    scale: float,
    threads: int,
    /,
) -> None: ...

# csrc/bindings/elementwise.cpp: bits are one row of all elements, divergences float64; scores (sce_spread, importance)
# are float64 if a tensor is, else float32.
def nearswap(out: Matrix, base: Matrix, expert: Matrix, t: float, least: float, threads: int, /) -> None: ...
def ram(
    out: Matrix,
    base: Matrix,
    experts: Sequence[Matrix],
    epsilon: float,
    factors: Sequence[float] | None,
    threads: int,
    /,
) -> None: ...
def ram_counts(  # counts int64, T x 2
    counts: int, base: Matrix, experts: Sequence[Matrix], epsilon: float, threads: int, /
) -> None: ...
def sce_spread(out: Matrix, base: Matrix, experts: Sequence[Matrix], threads: int, /) -> None: ...
def sce_energies(energies: int, base: Matrix, experts: Sequence[Matrix], bits: int, threads: int, /) -> None: ...
def sce(
    out: Matrix,
    base: Matrix,
    experts: Sequence[Matrix],
    bits: int,
    weights: Sequence[float],
    least: float,
    threads: int,
    /,
) -> None: ...
def row_divergence(divergence: int, base: Matrix, expert: Matrix, rows: int, columns: int, threads: int, /) -> None: ...
def importance(
    out: Matrix, base: Matrix, expert: Matrix, divergence: int, rows: int, columns: int, threads: int, /
) -> None: ...
def arcee_fusion(
    out: Matrix,
    base: Matrix,
    expert: Matrix,
    divergence: int,
    least: float,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...

# csrc/bindings/routed.cpp: x, dy, gates and biases float32, dots float64; weights and outputs of mixes as one row.
def mix_dense(
    out: Matrix, base: Matrix, gates: int, tasks: Dense, samples: int, rows: int, columns: int, threads: int, /
) -> None: ...
def mix_sparse(
    out: Matrix, base: Matrix, gates: int, tasks: Sparse, samples: int, rows: int, columns: int, threads: int, /
) -> None: ...
def dots_dense(out: int, delta: Matrix, tasks: Dense, threads: int, /) -> None: ...
def dots_sparse(out: int, delta: Matrix, tasks: Sparse, rows: int, columns: int, threads: int, /) -> None: ...
def add_sparse_products(
    y: Matrix, x: int, gates: int, tasks: Sparse, tokens: int, rows: int, columns: int, threads: int, /
) -> None: ...
def routed_product(
    y: int,
    x: int,
    ends: Sequence[int],
    gates: int,
    bias: int,
    transposed: bool,
    weight: Matrix,
    tasks: Dense | Sparse,
    rows: int,
    columns: int,
    lanes: int,
    threads: int,
    /,
) -> None: ...
def routed_gates(
    out: int,
    dy: int,
    x: int,
    ends: Sequence[int],
    weight: Matrix,
    tasks: Dense | Sparse,
    rows: int,
    columns: int,
    lanes: int,
    threads: int,
    /,
) -> None: ...
def routed_lanes() -> list[int]: ...
