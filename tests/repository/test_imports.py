"""Arrows between modules go one way, PyTorch and Triton come late, and kernels know nothing of pymerge."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pymerge.ops import OPS
from tests.helpers.imports import modules_after

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pymerge"

# What each part may import of pymerge, beside itself: from the top of the file or inside a function alike. A part is a
# package, or a module at the top.
_COMMON = "errors env common"
_READ = f"{_COMMON} checkpoint"
_COMPUTED = f"{_COMMON} ops"
_SAID = f"{_READ} ops methods architecture tokenizers"
_PLANNED = f"{_SAID} output config adapters"
_CARRIED_OUT = f"{_PLANNED} planner backends"
ARROWS = {
    "errors": "",
    "env": "",
    "common": "errors env",
    "ops": _COMMON,
    "checkpoint": _COMMON,
    "backends": _COMPUTED,
    "methods": _COMPUTED,
    "architecture": _READ,
    "tokenizers": _READ,
    "adapters": f"{_READ} architecture",
    "output": f"{_READ} backends",
    "config": _SAID,
    "planner": _PLANNED,
    "engine": _CARRIED_OUT,
    "live": f"{_CARRIED_OUT} engine",
    "analysis": f"{_CARRIED_OUT} engine",
    "api": f"{_CARRIED_OUT} engine grams",
    "extraction": f"{_CARRIED_OUT} engine api",
    "wemoe": f"{_CARRIED_OUT} engine",
    "grams": f"{_CARRIED_OUT} engine live wemoe",
    "search": f"{_COMMON} live",
    "testing": f"{_CARRIED_OUT} engine live api",
    "__init__": f"{_CARRIED_OUT} engine live api extraction search wemoe",
    "integrations": f"{_CARRIED_OUT} engine live api extraction",
    "cli": f"{_CARRIED_OUT} engine analysis api extraction wemoe grams integrations",
    "__main__": "cli",
}
# Compiled or Triton kernels: only backends import them, and only when they are called.
KERNELS = ("_C", "_cuda", "kernels")


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that a piece of code imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "pymerge":
                yield from (f"pymerge.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def imported_at_once(file: Path) -> list[str]:
    """What importing the file imports: not what stands in functions or under TYPE_CHECKING."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                found.extend(imported(ast.Module([child], [])))
            elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            ):
                visit(child)

    visit(ast.parse(file.read_text()))
    return found


def own_parts(names: Iterator[str] | list[str]) -> set[str]:
    """Parts of pymerge among dotted names."""
    parts = {[*name.split("."), "__init__"][1] for name in names if name.split(".")[0] == "pymerge"}
    # Names that pymerge/__init__.py hands out.
    return {part if part in ARROWS or part in KERNELS else "__init__" for part in parts}


def test_the_table_is_complete_and_has_no_circle() -> None:
    assert {part_of(file) for file in python_files(PACKAGE)} <= ARROWS.keys()
    allowed = {part: set(names.split()) for part, names in ARROWS.items()}
    order = list(TopologicalSorter(allowed).static_order())
    assert len(order) == len(ARROWS)
    assert order.index("ops") < order.index("methods") < order.index("planner") < order.index("engine")


@pytest.mark.parametrize("file", python_files(PACKAGE), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_go_one_way(file: Path) -> None:
    part = part_of(file)
    allowed = {part, *ARROWS[part].split()} | (set(KERNELS) if part == "backends" else set())
    assert own_parts(imported(ast.parse(file.read_text()))) <= allowed


def test_modules_of_a_package_do_not_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for file in python_files(PACKAGE):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(file.read_text())
        arrows[name] = set(imported(tree))
        for node in ast.walk(tree):  # from pymerge.ops import combine is pymerge.ops.combine
            if isinstance(node, ast.ImportFrom):
                arrows[name] |= {f"{node.module}.{alias.name}" for alias in node.names}
    # A package's __init__ is imported before its modules, whoever asks; it is no arrow of theirs.
    known = {name: targets & arrows.keys() for name, targets in arrows.items()}
    assert len(list(TopologicalSorter(known).static_order())) == len(arrows)


@pytest.mark.parametrize("file", python_files(PACKAGE), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_kernels_and_triton_are_imported_only_when_used(file: Path) -> None:
    names = imported_at_once(file)
    assert "triton" not in {name.split(".")[0] for name in names}
    assert own_parts(names).isdisjoint(KERNELS)


def test_triton_kernels_import_nothing_of_ours() -> None:
    files = python_files(ROOT / "kernels")
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in ("triton", "torch") for alias in node.names), file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                module = (node.module or "").split(".")[0]
                assert module in {"triton", "torch", *sys.stdlib_module_names}, file


def test_the_top_of_the_package_has_few_modules() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("package", ["common", "ops", "config", "planner"])
def test_what_all_merges_need_does_not_import_pytorch_at_its_top(package: str) -> None:
    for file in python_files(PACKAGE / package):
        assert "torch" not in {name.split(".")[0] for name in imported_at_once(file)}, file


def test_of_the_methods_only_solvers_import_pytorch_at_their_top() -> None:
    found: set[str] = set()
    for file in (PACKAGE / "methods").glob("*.py"):
        names = imported_at_once(file)
        if "torch" in {name.split(".")[0] for name in names} and "pymerge.methods.solver" not in names:
            found.add(file.stem)
    assert found <= {"solver", "eigenvectors"}


def includes(file: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE)


def test_csrc_includes_no_torch_and_pybind_only_in_bindings() -> None:
    files = [file for file in sorted((ROOT / "csrc").rglob("*")) if file.is_file()]
    assert {file.suffix for file in files} <= {".h", ".cpp", ".cu"}
    assert sum(len(includes(file)) for file in files) > len(files)
    for file in files:
        top = {name.split("/")[0] for name in includes(file)}
        assert top.isdisjoint({"torch", "ATen", "c10", "Python.h", "numpy"}), file
        assert "pybind11" not in top or file.parent.name == "bindings", file


def test_csrc_headers_include_nothing_above_them() -> None:
    for file in sorted((ROOT / "csrc" / "common").rglob("*")):
        assert not [name for name in includes(file) if name.startswith(("ops/", "io/", "bindings/"))], file
    for file in sorted((ROOT / "csrc" / "ops").glob("*.h")):
        assert not [name for name in includes(file) if name.startswith(("cuda", "io/", "bindings/"))], file


def test_the_files_of_csrc_ops_have_names_of_ops() -> None:
    """What several ops share is in csrc/common."""
    files = [file.name for file in sorted((ROOT / "csrc" / "ops").iterdir())]
    assert len(files) > 20
    assert not [file for file in files if not any(file.startswith((f"{name}.", f"{name}_")) for name in OPS)]


@pytest.mark.parametrize(
    "code",
    [
        "import pymerge; assert pymerge.__version__",
        "import sys, pymerge.cli.main\nsys.argv = ['pymerge', '--help']\n"
        "try:\n    pymerge.cli.main.main()\nexcept SystemExit as end:\n    assert end.code == 0",
        "import sys, pymerge.cli.main\nsys.argv = ['pymerge', 'merge', '--help']\n"
        "try:\n    pymerge.cli.main.main()\nexcept SystemExit as end:\n    assert end.code == 0",
    ],
)
def test_import_and_help_do_not_wait_for_pytorch(code: str) -> None:
    loaded = modules_after(code)
    assert "pymerge" in loaded
    assert loaded & {"torch", "numpy", "triton", "safetensors", "transformers"} == set()


def test_the_api_works_without_triton_and_transformers() -> None:
    loaded = modules_after(
        "import pymerge, torch\n"
        "base = torch.zeros(4, 4)\n"
        "pymerge.merge_tensors(base, [base + 1], 'wudi', iterations=1, device='cpu')"
    )
    assert "torch" in loaded
    assert "transformers" not in loaded
