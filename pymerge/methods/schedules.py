"""Weights of the checkpoints of one training that stand for a decay of its learning rate (WSM, arXiv 2507.17634).

K checkpoints W_1 .. W_K, the oldest first, have K - 1 updates g_i = W_{i+1} - W_i between them, and an average with
weights c_1 .. c_K that add up to 1 is W_1 + sum_i w_i g_i with w_i = c_{i+1} + ... + c_K: each update times a factor,
which falls from one to the next. A decay of the learning rate whose factor is f(x) at the part x of its duration, f(0)
= 1 and f(1) = 0, has w_i = f(i / K), and so c_i = f((i - 1) / K) - f(i / K) (Theorem 3.1 there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from pymerge.methods.base import Parameter

EMA = "ema"
# Factors of the learning rate that the other schedules stand for.
_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}
_UNIFORM = "uniform"

SCHEDULE = Parameter(
    "schedule",
    "choice",
    "none",
    "weights of checkpoints of one training, listed from the oldest on, in place of weight",
    choices=("none", _UNIFORM, EMA, *_DECAYS),
)
DECAY = Parameter(
    "decay",
    "number",
    0.8,
    "schedule ema: part of the average that stays at each checkpoint",
    minimum=0.0,
    maximum=1.0,
    only_with=(SCHEDULE.name, EMA),
)


def weights_of(schedule: str, count: int, decay: float) -> tuple[float, ...]:
    """Weights of `count` checkpoints, the oldest first, not negative; their sum need not be 1.

    `uniform` stands for a linear decay. `ema` is the average A_1 = W_1, A_i = decay A_{i-1} + (1 - decay) W_i.
    """
    if schedule == _UNIFORM:
        return (1.0,) * count
    if schedule == EMA:
        return (decay ** (count - 1), *((1.0 - decay) * decay ** (count - i) for i in range(2, count + 1)))
    factors = [_DECAYS[schedule](i / count) for i in range(count + 1)]
    return tuple(before - after for before, after in pairwise(factors))
