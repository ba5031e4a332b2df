"""One layer, without files: solvers in the space of the factors, beside the same solvers on whole weights.

Both start from what is in memory and end with the merged weight, in float32. The reduced form is timed by itself (it
ends with X as a product) and with W_0 + X, which is what the dense one gives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.adapters.inputs import factors
from benchmarks.harness import weights
from benchmarks.harness.synthetic import SIZES_OF_DELTAS, generator
from benchmarks.harness.targets import Row
from benchmarks.peers.published import alternate, seconds_of
from benchmarks.solvers.cases import action, ours
from pymerge.backends.runner import Runner
from pymerge.common.blas import one_blas_thread
from pymerge.methods.core.deltas import Delta
from pymerge.methods.core.factors import Factors
from pymerge.testing.bench import summary

METHODS = ("wudi_flow", "ace")
EPS = 1e-5  # ACE's ridge
SHAPES = ("2048x2048x3", "2048x2048x8", "8192x2048x3", "8192x2048x8", "2048x8192x3", "2048x8192x8")
AGREEMENT = 1e-4  # largest relative error of X: weights in float32 hold their deltas with fewer digits than factors do


class Layer:
    """The factors of a layer's tasks, and the weights that they make."""

    def __init__(self, shape: str, rank: int) -> None:
        self.d_out, self.d_in, self.tasks = weights.sizes(shape)
        self.rank = min(rank, self.d_out, self.d_in)
        sizes = [SIZES_OF_DELTAS[task % len(SIZES_OF_DELTAS)] for task in range(self.tasks)]
        self.pairs = [factors(self.d_out, self.d_in, self.rank, size, shape, task) for task, size in enumerate(sizes)]
        self.base = 0.02 * torch.randn(self.d_out, self.d_in, generator=generator(shape))
        self.experts = [torch.addmm(self.base, B, A) for B, A in self.pairs]
        self.out = torch.empty_like(self.base)

    def reduced(self, method: str) -> Delta:
        """X as a product, by one thread, as a merge computes it."""
        with one_blas_thread():
            tasks = [Factors(B.double().numpy(), A.double().numpy()) for B, A in self.pairs]
            return action(method, "auto", EPS).run_core(tasks)

    def summed(self, method: str) -> Tensor:
        """W_0 + X."""
        self.reduced(method).prepared(False, 1).add(Runner("auto", "cpu"), self.base, 0, self.out)
        return self.out

    def compare(self, method: str, seconds: float) -> Iterator[Row]:
        """Rows of one method: the difference of both forms' X, and what they take in turns."""
        about = {"part": "layers", "d_out": self.d_out, "d_in": self.d_in, "tasks": self.tasks, "rank": self.rank}
        began = time.perf_counter()
        exact = ours(method, "auto", EPS, out=torch.float64)(self.base, self.experts) - self.base.double()
        known = {"dense": time.perf_counter() - began}
        found = torch.empty_like(exact)
        self.reduced(method).prepared(True, 1).add(Runner("auto", "cpu"), torch.zeros_like(exact), 0, found)
        difference = float((found - exact).norm() / exact.norm())
        if difference > AGREEMENT:
            yield {"kind": "disagreement", **about, "method": method, "difference": difference}
            return
        dense = ours(method, "auto", EPS)
        variants: dict[str, Callable[[], float]] = {
            "dense": partial(seconds_of, lambda: dense(self.base, self.experts)),
            "core": partial(seconds_of, lambda: self.reduced(method)),
            "core and sum": partial(seconds_of, lambda: self.summed(method)),
        }
        times = {form: summary(each) for form, each in alternate(variants, known, seconds).items()}
        for form, each in times.items():
            speedup = times["dense"]["median"] / each["median"]
            row = {"method": method, "form": form, "seconds": each, "speedup_over_dense": speedup}
            yield {"kind": "layer", **about, **row, "difference": difference}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Rows of all shapes and methods."""
    for shape in options.shapes:
        layer = Layer(shape, options.rank)
        for method in METHODS:
            yield from layer.compare(method, options.seconds)
