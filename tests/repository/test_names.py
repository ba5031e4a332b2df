"""One basename an op: in the folders of ops, of backends, of kernels, of C++, of tests and of benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from pymerge.backends.runner import BACKENDS, implemented
from pymerge.methods import METHODS
from pymerge.ops import OPS
from pymerge.ops._op import Op

ROOT = Path(__file__).resolve().parents[2]
ON_FILES = {"combine_files", "part_digests"}  # of native code, which are no ops
BACKEND_FOLDERS = sorted(name for name in BACKENDS if name != "reference")


def stems(folder: str, pattern: str) -> list[str]:
    return sorted(path.stem for path in ROOT.glob(f"{folder}/{pattern}") if not path.stem.startswith("_"))


@pytest.mark.parametrize("name", OPS)
def test_every_module_of_ops_is_one_op_with_a_test_file(name: str) -> None:
    assert issubclass(OPS[name], Op)
    assert OPS[name].name == name
    assert OPS[name].summary
    assert (ROOT / "tests" / "ops" / f"test_{name}.py").exists()


@pytest.mark.parametrize("backend", BACKEND_FOLDERS)
def test_modules_of_backends_are_called_as_the_ops(backend: str) -> None:
    assert implemented(backend)
    assert set(stems(f"pymerge/backends/{backend}", "*.py")) - ON_FILES == set(implemented(backend))


@pytest.mark.parametrize(("folder", "pattern"), [("csrc/ops", "*"), ("kernels", "*.py")])
def test_files_of_compiled_code_begin_with_an_ops_name(folder: str, pattern: str) -> None:
    files = stems(folder, pattern)
    assert files
    assert not [stem for stem in files if not stem.startswith(tuple(OPS))]


def test_methods_have_the_names_of_the_table() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.source
