"""What all tests share: Triton's interpreter where there is no GPU, and memory that starts as NaN."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so before anything imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch.empty returns NaN in deterministic mode: what a kernel forgets to write cannot look right by luck.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
