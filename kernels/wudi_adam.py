"""wudi_adam: N Adam steps on the gradient 2 (D A - B); a step is one kernel, a product with the update in its epilogue.

A block computes one tile of D A, and without storing it updates the tile's D, m and v in place. Tensor cores have no
float32: both operands are kept as two float16 numbers, hi + lo, and a product is three of them (lo hi + hi lo + hi hi).
What is left out, lo lo, is 2^-22 of a term. float16 has few exponents, so each column of A, and all of D, is scaled by
a power of two to what it holds best, and the product is scaled back. How large D may become is known beforehand: Adam
bounds its steps. Beside its float32 form a step writes D's two parts to the other of two buffers: other blocks still
read the old ones. Layers of a batch are the second axis of the grid.

What decided fusing: a step moves 36 bytes an element besides the operands (B; D, m, v read and written; two parts
written); storing and reading the product would add 8. What decided float16: by an H100's data sheet tensor cores do 990
Tflop/s of it, 495 in TF32, which takes three products as well, and 67 without them.

What changes from step to step is read from device memory by a step number that lies there, too: so a captured pair of
steps (parts to the other buffer and back) replays as a graph for all of them. The number lies in two places that take
turns: every block of a step reads one, and the step's first block writes the next step's number to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import MOST_SUMMED, Table, Variant, grouped_tile, sizes

# The exponent that operands are scaled to: float16 ends at 2^16, and its smallest steps are 2^-24.
TOP = 13


@triton.jit
def wudi_adam_kernel(
    D,  # this, m, v and B are [L, rows, columns] float32, contiguous
    m,
    v,
    B,
    target,  # hi and lo of D after the step: [2, L, rows, columns] float16
    source,  # the same before it
    A,  # hi and lo: [2, L, columns, columns] float16
    unscale,  # [L, columns]: of columns of the product
    scale,  # [L]: of D as hi + lo
    schedule,  # [steps, L, 2]: sqrt(1 - beta2^k), -lr / (1 - beta1^k)
    numbers,  # [2]: the step's number, and where the next one's is written
    layers,
    rows,
    columns,
    take1,
    keep2,
    take2,
    eps,
    TURN: tl.constexpr,
    MOST_SUMMED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    place = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    number = tl.load(numbers + TURN)
    if (place == 0) & (layer == 0):
        tl.store(numbers + 1 - TURN, number + 1)
    factors = schedule + (number * layers + layer) * 2
    correction = tl.load(factors)
    rate = tl.load(factors + 1)

    tile_row, tile_column = grouped_tile(place, tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK), GROUP)
    row = tile_row * BLOCK + tl.arange(0, BLOCK)
    column = tile_column * BLOCK + tl.arange(0, BLOCK)
    in_rows = (row < rows)[:, None]
    in_columns = (column < columns)[None, :]
    all_layers = tl.cast(layers, tl.int64)
    left_lo = all_layers * rows * columns  # from hi to lo
    right_lo = all_layers * columns * columns
    first = layer * rows * columns
    wide_row = row.to(tl.int64)[:, None] * columns
    source += first
    A += layer * columns * columns

    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for begin in range(0, columns, MOST_SUMMED):
        part = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(begin, tl.minimum(begin + MOST_SUMMED, columns), DEPTH):
            k = start + tl.arange(0, DEPTH)
            inside = k < columns
            left = source + wide_row + k[None, :]
            right = A + k.to(tl.int64)[:, None] * columns + column[None, :]
            of_left = in_rows & inside[None, :]
            of_right = inside[:, None] & in_columns
            left_hi = tl.load(left, mask=of_left, other=0.0)
            right_hi = tl.load(right, mask=of_right, other=0.0)
            part = tl.dot(tl.load(left + left_lo, mask=of_left, other=0.0), right_hi, part)
            part = tl.dot(left_hi, tl.load(right + right_lo, mask=of_right, other=0.0), part)
            part = tl.dot(left_hi, right_hi, part)
        product += part
    product *= tl.load(unscale + layer * columns + column, mask=column < columns, other=0.0)[None, :]

    here = first + wide_row + column[None, :]
    mask = in_rows & in_columns
    gradient = 2.0 * (product - tl.load(B + here, mask=mask, other=0.0))
    moment = tl.load(m + here, mask=mask, other=0.0)
    moment += take1 * (gradient - moment)
    square = keep2 * tl.load(v + here, mask=mask, other=0.0) + take2 * gradient * gradient
    moved = tl.load(D + here, mask=mask, other=0.0)
    moved += tl.div_rn(rate * moment, tl.div_rn(tl.sqrt_rn(square), correction) + eps)
    tl.store(m + here, moment, mask=mask)
    tl.store(v + here, square, mask=mask)
    tl.store(D + here, moved, mask=mask)
    scaled = moved * tl.load(scale + layer)
    hi = scaled.to(tl.float16)
    tl.store(target + here, hi, mask=mask)
    tl.store(target + left_lo + here, (scaled - hi.to(tl.float32)).to(tl.float16), mask=mask)


def launch(
    A: Tensor, B: Tensor, schedule: Tensor, betas: tuple[float, float], eps: float, exponents: list[int]
) -> Tensor:
    """Return D, [L, d_out, d_in], after as many steps as `schedule` has.

    A is [L, d_in, d_in], B [L, d_out, d_in], schedule [steps, L, 2] as the kernel says; float32, contiguous. D is below
    2^exponent in each layer.
    """
    layers, rows, columns = B.shape
    D, m, v = torch.zeros_like(B), torch.zeros_like(B), torch.zeros_like(B)
    parts = torch.zeros(2, 2, *B.shape, dtype=torch.float16, device=B.device)
    scale = torch.tensor([2.0 ** (TOP - exponent) for exponent in exponents]).to(B.device)
    halves, of_columns = split(A)
    unscale = (of_columns * scale[:, None]).reciprocal_()
    numbers = torch.zeros(2, dtype=torch.int64, device=B.device)

    def blocks(block: int) -> int:
        return triton.cdiv(rows, block) * triton.cdiv(columns, block)

    size = sizes("wudi_adam", B.device, blocks)
    grid = (blocks(size.block), layers)

    def step(turn: int) -> None:
        wudi_adam_kernel[grid](
            D,
            m,
            v,
            B,
            parts[1 - turn],
            parts[turn],
            halves,
            unscale,
            scale,
            schedule,
            numbers,
            layers,
            rows,
            columns,
            1.0 - betas[0],
            betas[1],
            1.0 - betas[1],
            eps,
            TURN=turn,
            MOST_SUMMED=MOST_SUMMED,
            BLOCK=size.block,
            DEPTH=size.depth,
            GROUP=size.group,
            num_warps=size.warps,
            num_stages=size.stages,
        )

    steps = len(schedule) if B.numel() else 0
    # In the interpreter there are no graphs, and somebody else's capture takes no other inside.
    graphs = B.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    repeat(step, steps, capture if graphs else None)
    return D


def split(A: Tensor) -> tuple[Tensor, Tensor]:
    """hi and lo of the columns of a batch of matrices, [2, L, n, n], and the powers of two that they are scaled by."""
    if A.numel() == 0:
        return A.new_zeros(2, *A.shape, dtype=torch.float16), A.new_ones(A.shape[0], A.shape[2])
    _, exponents = torch.frexp(A.abs().amax(dim=1))
    scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), (TOP - exponents).clamp_(-100, 100))
    halves = torch.empty(2, *A.shape, dtype=torch.float16, device=A.device)
    for matrix, factors, hi, lo in zip(A, scale, *halves, strict=True):
        scaled = matrix * factors
        hi.copy_(scaled)
        lo.copy_(scaled.sub_(hi))
    return halves, scale


Launches = Callable[[], object]


def repeat(step: Callable[[int], None], steps: int, capture: Callable[[Launches], Launches] | None) -> None:
    """Call step(0), step(1), step(0), ..., `steps` calls in all: plainly, or all pairs but the first by replays.

    The first pair is never captured: it compiles and loads the kernels, which is not allowed in a capture.
    """

    def pair() -> None:
        step(0)
        step(1)

    pairs = steps // 2
    replays = pairs - 1 if capture is not None and pairs > 2 else 0
    for _ in range(pairs - replays):
        pair()
    if capture is not None and replays:
        replay = capture(pair)
        for _ in range(replays):
            replay()
    if steps % 2:
        step(0)


def capture(launches: Launches) -> Launches:
    """A graph of what `launches` puts on the stream, and which allocates nothing; returns its replay.

    torch.cuda.graph would synchronise and collect garbage first. Other threads may go on allocating meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with _capturing, torch.cuda.stream(capture_stream(torch.cuda.current_device())):
        graph.capture_begin(capture_error_mode="thread_local")
        launches()
        graph.capture_end()
    return graph.replay


_capturing = Lock()  # one stream takes one capture


@cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """The stream of a device that graphs are captured on: copies that others put on it meanwhile would be recorded.

    PyTorch hands streams out of a pool, the same ones again and again. Those of high priority are of another pool than
    the streams that readers and writers have, and nobody else here asks for one.
    """
    return torch.cuda.Stream(device, priority=-1)


def variants(table: Table) -> Iterator[Variant]:
    """All sizes."""
    for size in table["wudi_adam"]:
        types = dict.fromkeys(("D", "m", "v", "B", "unscale", "scale", "schedule"), "*fp32")
        types |= dict.fromkeys(("target", "source", "A"), "*fp16") | {"numbers": "*i64"}
        types |= dict.fromkeys(("layers", "rows", "columns"), "i32")
        types |= dict.fromkeys(("take1", "keep2", "take2", "eps"), "fp32")
        constants = {"TURN": 0, "MOST_SUMMED": MOST_SUMMED}
        constants |= {"BLOCK": size.block, "DEPTH": size.depth, "GROUP": size.group}
        yield Variant(f"wudi_adam {size.block}", wudi_adam_kernel, types, constants, size)
