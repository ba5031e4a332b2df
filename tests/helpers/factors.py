"""Random task vectors of low rank, as factors and as matrices, for tests of what is computed in their small space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from pymerge.methods.core.factors import Factors


@dataclass(frozen=True)
class Layer:
    """Shape of a weight, ranks of its tasks, which of them are zero, and which are an earlier one again."""

    d_out: int
    d_in: int
    ranks: tuple[int, ...]
    zeros: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    rms: float = 1e-2
    seed: int = 0

    def factors(self) -> list[Factors]:
        """Factors of tasks of different sizes, whose A and B differ in scale."""
        generator = torch.Generator().manual_seed(self.seed)
        found: list[Factors] = []
        for task, rank in enumerate(self.ranks):
            B = torch.randn(self.d_out, rank, generator=generator, dtype=torch.float64)
            A = torch.randn(rank, self.d_in, generator=generator, dtype=torch.float64)
            size = self.rms * (1.0 + task) / max(1, rank) ** 0.5
            factors = Factors((B * (size * 1e3)).numpy(), (A * 1e-3).numpy())
            if task in self.copies and found:
                factors = found[0]
            found.append(Factors(np.zeros_like(factors.B), factors.A) if task in self.zeros else factors)
        return found


def dense(factors: list[Factors]) -> list[Tensor]:
    """tau_t, d_out x d_in."""
    return [torch.from_numpy(B @ A) for B, A in factors]


@st.composite
def layers(draw: st.DrawFn, most_tasks: int = 8) -> Layer:
    """Tall, wide and square layers with R from 0 to half of the smaller side, or a little more."""
    d_out, d_in = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    tasks = draw(st.integers(1, most_tasks))
    most = max(1, (min(d_out, d_in) // 2) // tasks)
    ranks = tuple(draw(st.lists(st.integers(0, most), min_size=tasks, max_size=tasks)))
    chosen = st.lists(st.integers(1, tasks), max_size=2).map(tuple)
    return Layer(d_out, d_in, ranks, draw(chosen), draw(chosen), seed=draw(st.integers(0, 99)))
