"""The dtypes that the compiled backends know, by the codes of csrc/common/dtype.h."""

from __future__ import annotations

import torch

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
