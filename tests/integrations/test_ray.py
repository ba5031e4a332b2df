"""Ray with pymerge, in a process in which it is installed; without it, what to install."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.harness.environments import RAY_BESIDE
from pymerge.errors import ArgumentError
from pymerge.integrations.ray import merge
from tests.helpers.checkpoints import llama, llama_config, pymerge, write_config, write_models
from tests.helpers.libraries import run_inside


def test_inside_a_cluster_in_short() -> None:
    """Of the tests below those without which nothing else counts: the bytes, and what becomes of an error."""
    run_inside("ray_cluster", RAY_BESIDE, only="(test_the_bytes and linear) or test_an_error_of_ours")


@pytest.mark.slow
def test_inside_a_cluster() -> None:
    run_inside("ray_cluster", RAY_BESIDE)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_the_error_names_what_to_install(tmp_path: Path) -> None:
    base = llama()
    config = write_config(write_models(tmp_path, base, config=llama_config(base)), "linear")
    done = pymerge("merge", config, tmp_path / "out", "--ray", "local")
    assert done.code == 5, done
    assert done.errors == ["ray is not installed; pip install 'pymerge-engine[ray]'\n"]
    assert not (tmp_path / "out").exists()


def test_tasks_of_ray_are_of_ray_alone(tmp_path: Path) -> None:
    base = llama(blocks=1)
    config = write_config(write_models(tmp_path, base, config=llama_config(base)), "linear")
    for more in (("--ray-cpus", "2"), ("--ray-gpus", "0"), ("--adapter", "--ray-cpus", "2")):
        done = pymerge("merge", config, tmp_path / "out", *more)
        assert done.code == 5, done
        assert done.errors == ["--ray-cpus and --ray-gpus are of tasks of Ray; add --ray, or leave them out\n"]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("cpus", "gpus"), [(0, 0), (1, 2), (-1, 0)])
def test_tasks_that_are_not_possible(tmp_path: Path, cpus: int, gpus: int) -> None:
    with pytest.raises(ArgumentError, match="give 1 CPU or more, and 0 or 1 GPU"):
        merge({}, tmp_path / "out", cpus=cpus, gpus=gpus)
