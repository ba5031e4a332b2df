"""Checks pymerge as it is installed, without PyTorch: python check.py.

C++ loads; merges of small models by weighted sums agree with float64; and a digest for each merge of native code, to be
compared between machines.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import _C

SHAPES = {"layers.0.up.weight": (300, 70), "layers.0.down.weight": (70, 300), "norm.weight": (70,), "bias": (1,)}
METHODS = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5, "lambda": 0.7},
    "ties": {"weight": 1, "density": 0.3},
    "dare_ties": {"weight": 1, "density": 0.5},
    "della": {"weight": 1, "density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"weight": 1, "density": 0.7, "gamma": 0.05},
    "sce": {},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "ram": {},
    "nearswap": {"t": 0.01},
    "arcee_fusion": {},
}


def main() -> None:
    """Merge by each method, compare, and print the digests as JSON."""
    assert "torch" not in sys.modules
    with tempfile.TemporaryDirectory() as folder:
        models = _models(Path(folder))
        digests = {}
        for method, parameters in METHODS.items():
            experts = [models[1]] if method in ("slerp", "nearswap", "arcee_fusion") else models[1:]
            listed = [*([models[0]] if method == "slerp" else []), *experts]
            config = {
                "merge_method": method,
                "base_model": str(models[0]),
                "models": [{"model": str(model)} for model in listed],
                "parameters": parameters,
            }
            plan = pymerge.plan(config)
            assert not plan.needs_torch, f"{method} would need PyTorch"
            out = Path(folder, method)
            pymerge.run(plan, out, progress=False)
            digests[method] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
            if method in ("linear", "task_arithmetic"):
                _compare(method, out, models)
    assert "torch" not in sys.modules
    found = {"machine": platform.machine(), "python": platform.python_version(), "file": _C.__file__}
    print(json.dumps({**found, "build": _C.build_info(), "digests": digests}, indent=2))


def _models(folder: Path) -> list[Path]:
    """A base and three experts."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    paths = []
    for number in range(4):
        moved = {
            name: value + np.float32(0.01 * (number > 0)) * random.standard_normal(value.shape).astype(np.float32)
            for name, value in base.items()
        }
        paths.append(folder / f"model{number}")
        paths[-1].mkdir()
        save_file(moved, paths[-1] / "model.safetensors", {"format": "pt"})
    return paths


def _compare(method: str, out: Path, paths: list[Path]) -> None:
    """AssertionError unless a merge is that of float64, to a rounding of float32."""
    base, *experts = (load_file(path / "model.safetensors") for path in paths)
    for name, merged in load_file(out / "model.safetensors").items():
        wide = [expert[name].astype(np.float64) for expert in experts]
        origin = base[name].astype(np.float64)
        exact = sum(wide) / 3 if method == "linear" else origin + 0.7 * sum(0.5 * (each - origin) for each in wide)
        np.testing.assert_allclose(merged, exact, rtol=1e-6, atol=1e-6, err_msg=f"{method}: {name}")


if __name__ == "__main__":
    main()
