"""The wheel, really installed: where Hydra finds the plugin, and FusionBench the configs, without a flag."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import pymerge._C
from benchmarks.harness.environments import FUSION_BENCH_BESIDE, packages_beside

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = (".*", "build", "*.egg-info", "*.so", "__pycache__", "runs", "results", "tests", "docs")


def run(where: Path, *command: str | Path) -> str:
    """What a command prints, outside the checkout and without its path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables = {**kept, "HF_HUB_OFFLINE": "1", "PYMERGE_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=where, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-10_000:]
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel of a copy of the checkout. What is compiled is what is installed here, and not compiled again."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    built = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "pymerge"
    built.mkdir(parents=True)
    shutil.copyfile(pymerge._C.__file__, built / Path(pymerge._C.__file__).name)  # newer than its sources
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(folder, *pip, "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment of its own with the wheel, which sees other packages, and the checkout nowhere."""
    folder = tmp_path_factory.mktemp("wheel")
    run(folder, sys.executable, "-m", "venv", "--without-pip", folder / "own")
    own = folder / "own" / "bin" / "python"
    run(folder, sys.executable, "-m", "pip", "--python", own, "install", "--no-deps", "--no-index", build(folder))
    others = [packages_beside(FUSION_BENCH_BESIDE), sysconfig.get_path("purelib")]
    site = Path(run(folder, own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "others.pth").write_text("".join(f"{other}\n" for other in others))
    return own


def test_it_is_what_is_imported(python: Path, tmp_path: Path) -> None:
    said = run(
        tmp_path, python, "-c", "import pymerge, pymerge._C; print(pymerge.__file__); print(pymerge._C.__file__)"
    )
    assert all(line.startswith(str(python.parents[1])) for line in said.splitlines()[-2:])
    assert "wudi_flow" in run(tmp_path, python.parent / "pymerge", "methods")


def test_the_plugin_is_found_and_imports_neither_torch_nor_pymerge(python: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from hydra.core.plugins import Plugins\n"
        "from hydra.plugins.search_path_plugin import SearchPathPlugin\n"
        "found = [each.__module__ for each in Plugins.instance().discover(SearchPathPlugin)]\n"
        "print('hydra_plugins.pymerge_config' in found, *({'torch', 'pymerge', 'numpy'} & sys.modules.keys()))"
    )
    assert run(tmp_path, python, "-c", program).splitlines()[-1] == "True"


def test_fusion_bench_finds_the_configs_without_a_flag(python: Path, tmp_path: Path) -> None:
    command = ["-m", "fusion_bench.scripts.cli", "--cfg", "job", "--package", "method", "method=pymerge/ties"]
    said = run(tmp_path, python, *command)
    assert "_target_: pymerge.integrations.fusion_bench.Merge" in said
    assert "merge_method: ties" in said
