"""FusionBench with pymerge: in a process in which it is installed, and what is packaged for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.harness.environments import FUSION_BENCH_BESIDE
from pymerge.integrations.fusion_bench_config.generate import FOLDER, TARGET, configs
from pymerge.methods import METHODS
from tests.helpers.imports import modules_after
from tests.helpers.libraries import run_inside

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fusion_bench_merge", "fusion_bench_parity", "fusion_bench_regmean"])
def test_inside_fusion_bench(name: str) -> None:
    run_inside(name, FUSION_BENCH_BESIDE)


def test_the_configs_are_up_to_date() -> None:
    """python -m pymerge.integrations.fusion_bench_config writes them."""
    assert {file.name: file.read_text() for file in FOLDER.glob("*")} == configs()


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].needs_inputs])
def test_a_config_has_all_parameters_at_their_defaults(name: str) -> None:
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert (config["_target_"], config["merge_method"]) == (TARGET, name)
    given = dict(config["parameters"]) | ({"weight": config["weights"]} if "weights" in config else {})
    wanted = {each.name: each for each in METHODS[name].all_parameters if not each.no_effect and each.only_with is None}
    assert given.keys() == wanted.keys()
    assert {key: wanted[key].parse(value) for key, value in given.items()} == {
        key: each.default for key, each in wanted.items()
    }


def test_the_plugin_and_the_configs_import_nothing_of_ours() -> None:
    """Hydra imports both in every program: PyTorch and the like would slow all of them down."""
    text = (ROOT / "pymerge/integrations/hydra/hydra_plugins/pymerge_config/__init__.py").read_text()
    imported = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert imported
    assert all(line.startswith("from hydra.") for line in imported)
    loaded = modules_after("import pymerge.integrations.fusion_bench_config")
    assert loaded & {"torch", "numpy", "fusion_bench", "hydra", "yaml", "pydantic"} == set()


def test_they_are_packaged(tmp_path: Path) -> None:
    """hydra_plugins is shared with others: a file of its own there would hide theirs."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.glob("hydra_plugins/**/*.*")] == [
        "hydra_plugins/pymerge_config/__init__.py"
    ]
    assert not (tmp_path / "pymerge" / "integrations" / "hydra").exists()
    built = tmp_path / "pymerge" / "integrations" / "fusion_bench_config"
    assert len(list(built.glob("method/pymerge/*.yaml"))) == len(configs())
