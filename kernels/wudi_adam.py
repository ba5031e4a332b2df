"""wudi_adam: N Adam steps on the gradient 2 (D A - B); a step is one kernel, a product with the update in its epilogue.

A block computes one tile of D A, in float32 by three TF32 products (within 2^-19 of the terms' size), and without
storing it updates the tile's m and v in place and writes the tile's D to the other of two buffers: other blocks still
read the old one. Layers of a batch are the second axis of the grid.

What decided fusing: a step moves 28 bytes an element besides the operands (B, m, v, D read; m, v, D written) for
6 d_in flops of tensor cores. An H100's balance (495 Tflop/s TF32 over 3.35 TB/s by its data sheet, 148 flops a byte) is
where d_in is 700: below, a step waits on these bytes, and storing and reading the product would add 8 to the 28.

What changes from step to step is read from device memory by a step number that lies there, too: so a captured pair of
steps (D to the other buffer and back) replays as a graph for all of them. The number lies in two places that take
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

from ._common import Table, Variant, grouped_tile, sizes


@triton.jit
def wudi_adam_kernel(
    target,  # D after the step; this and all below are [L, rows, columns], contiguous
    source,  # D before it
    m,
    v,
    A,  # [L, columns, columns]
    B,
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
    first = layer * rows * columns
    wide_row = row.to(tl.int64)[:, None] * columns
    A += layer * columns * columns

    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, columns, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < columns
        left = tl.load(source + first + wide_row + k[None, :], mask=in_rows & inside[None, :], other=0.0)
        right = tl.load(A + k.to(tl.int64)[:, None] * columns + column[None, :], inside[:, None] & in_columns, 0.0)
        product = tl.dot(left, right, product, input_precision="tf32x3")

    here = first + wide_row + column[None, :]
    mask = in_rows & in_columns
    gradient = 2.0 * (product - tl.load(B + here, mask=mask, other=0.0))
    moment = tl.load(m + here, mask=mask, other=0.0)
    moment += take1 * (gradient - moment)
    square = keep2 * tl.load(v + here, mask=mask, other=0.0) + take2 * gradient * gradient
    moved = tl.load(source + here, mask=mask, other=0.0)
    moved += tl.div_rn(rate * moment, tl.div_rn(tl.sqrt_rn(square), correction) + eps)
    tl.store(m + here, moment, mask=mask)
    tl.store(v + here, square, mask=mask)
    tl.store(target + here, moved, mask=mask)


def launch(A: Tensor, B: Tensor, schedule: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Return D, [L, d_out, d_in], after as many steps as `schedule` has.

    A is [L, d_in, d_in], B [L, d_out, d_in], schedule [steps, L, 2] as the kernel says; float32, contiguous.
    """
    layers, rows, columns = B.shape
    D, other, m, v = torch.zeros_like(B), torch.empty_like(B), torch.zeros_like(B), torch.zeros_like(B)
    numbers = torch.zeros(2, dtype=torch.int64, device=B.device)

    def blocks(block: int) -> int:
        return triton.cdiv(rows, block) * triton.cdiv(columns, block)

    size = sizes("wudi_adam", B.device, blocks)
    grid = (blocks(size.block), layers)

    def step(turn: int) -> None:
        wudi_adam_kernel[grid](
            D if turn else other,
            other if turn else D,
            m,
            v,
            A,
            B,
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
    return other if steps % 2 else D


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
        types = dict.fromkeys(("target", "source", "m", "v", "A", "B", "schedule"), "*fp32") | {"numbers": "*i64"}
        types |= dict.fromkeys(("layers", "rows", "columns"), "i32")
        types |= dict.fromkeys(("take1", "keep2", "take2", "eps"), "fp32")
        constants = {"TURN": 0, "BLOCK": size.block, "DEPTH": size.depth, "GROUP": size.group}
        yield Variant(f"wudi_adam {size.block}", wudi_adam_kernel, types, constants, size)
