"""The search of examples/search, as its page runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.environments import LM_EVAL_BESIDE, variables_beside
from examples.search.samplers import SAMPLERS
from examples.search.search import DEPTHS, TASKS, main


@pytest.mark.slow
def test_thirty_trials_beat_the_grid_and_the_front_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "search"
    main(["--smoke", "--out", str(out)])
    found = json.loads((out / "search.json").read_text())
    best = found["best"]
    assert best["cma"]["mean"] > best["grid"]["mean"]
    assert sum(trial["found"] == "cma" for trial in found["trials"]) == 30
    assert set(best["cma"]["coefficients"]) == {*DEPTHS, "*"}
    assert len(found["front"]["coefficients"]) >= 20
    assert len(best["map"]["coefficients"]) == len(best["map"]["test"]) == len(TASKS)
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_search_by_the_harness_beats_its_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.search.language", "--smoke", "--out", str(tmp_path / "found")]
    variables = variables_beside(LM_EVAL_BESIDE) | {"HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "found" / "search.json").read_text())
    assert found["tasks"] == ["letters_up", "letters_down"]
    assert len(found["trials"]) == 21
    assert found["best"]["mean"] > found["trials"][0]["mean"]


def test_pycma_goes_downhill() -> None:
    sampler = SAMPLERS["cma"]([0.4, 0.4], 0.2, 0)
    scores = []
    for _ in range(100):
        x, y = sampler.ask()
        scores.append(-((x - 1) ** 2) - (y + 0.5) ** 2)
        sampler.tell(scores[-1])
    assert max(scores[-10:]) > max(scores[:10]) / 10
