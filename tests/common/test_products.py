"""PyTorch's products have the same bits for any number of threads in a process that begins with pymerge."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import pymerge, torch
generator = torch.Generator().manual_seed(1)
for dtype in (torch.float32, torch.float64):
    for rows, between, columns in ((64, 1376, 128), (128, 4096, 512), (576, 1536, 576), (192, 576, 576)):
        left = torch.randn(rows, between, generator=generator, dtype=dtype)
        right = torch.randn(between, columns, generator=generator, dtype=dtype)
        products = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            products.append(left @ right)
        if not all(torch.equal(products[0], each) for each in products[1:]):
            print(dtype, rows, between, columns)
"""


def test_threads_change_no_product() -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("MKL_CBWR", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_a_setting_that_is_there_stays() -> None:
    program = "import pymerge, os; print(os.environ['MKL_CBWR'])"
    variables = os.environ | {"MKL_CBWR": "COMPATIBLE"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "COMPATIBLE\n"
