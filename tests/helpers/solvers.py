"""Shapes and dtypes for methods that solve, and the X that the engine finds."""

from __future__ import annotations

import os

import torch

import pymerge
from pymerge.testing.compare import as_float64

# (d_out, d_in, T, rank): square-ish and tiny, tall, wide, rank-deficient, wide with few tasks (A is singular), one
# row, one column, one task.
SHAPES = [
    (7, 9, 4, None),
    (96, 64, 8, None),
    (32, 96, 4, None),
    (20, 16, 3, 2),
    (24, 160, 3, None),
    (1, 16, 3, None),
    (16, 1, 3, None),
    (12, 10, 1, None),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = os.environ.get("PYMERGE_TEST_DEVICE", "cpu")  # `make gpu` sets cuda


def merged_delta(base, experts, method, **parameters):
    """X found by the engine, in float64: a float64 result, so that adding it to W_0 rounds nothing away."""
    merged = pymerge.merge_tensors(base, experts, method, dtype=torch.float64, device=DEVICE, **parameters)
    return as_float64(merged) - as_float64(base)
