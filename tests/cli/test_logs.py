"""--log-json: one JSON object a line for what a merge does, appended, and never the reason why an error is lost."""

from __future__ import annotations

import functools
import json
import logging
import resource
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge.common.events import event, logger, recording
from pymerge.errors import OutputError
from tests.helpers.checkpoints import change, llama, llama_config, pymerge, write_config, write_models


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base, e0, e1 and merge.yml (linear, with a warning)."""
    base = llama(blocks=1)
    write_models(tmp_path, base, config=llama_config(base))
    change(tmp_path / "e0", lambda tensors: tensors.update({"value_head.weight": torch.ones(3)}))
    write_config(tmp_path, "linear", more="extra_tensors: ignore")
    return tmp_path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def test_a_merge_tells_all_it_does(models: Path) -> None:
    log = models / "log.jsonl"
    args = ("merge", models / "merge.yml", models / "out", "--max-shard-size", "3KB", "--quiet", "--log-json", log)
    done = pymerge(*args)
    assert (done.code, done.out, done.err) == (0, "", "")
    events = lines(log.read_text())
    names = sorted(llama(blocks=1))
    (plan,) = named(events, "plan")
    assert (plan["method"], plan["tensors"], plan["device"], plan["backend"]) == ("linear", len(names), "cpu", "auto")
    assert plan["models"] == [str(models / name) for name in ("base", "e0", "e1")]
    (warning,) = named(events, "warning")
    assert warning["level"] == "warning"
    assert "value_head.weight" in warning["message"]
    (chosen,) = named(events, "backend_chosen")
    assert (chosen["op"], chosen["backend"]) == ("combine", "native")
    assert chosen["reason"]
    finished = named(events, "step_finished")
    assert sorted(step["tensor"] for step in finished) == names
    assert sorted(step["tensor"] for step in named(events, "step_started")) == names
    assert sum(step["bytes_written"] for step in finished) == 4 * plan["parameters"]
    assert sum(step["bytes_read"] for step in finished) == plan["bytes_read"]
    assert all(0 <= step["seconds"] < 60 for step in finished)
    assert len(named(events, "shard_finished")) == plan["shards"]
    (summary,) = named(events, "finished")
    assert summary is events[-1]
    assert (summary["tensors"], summary["output"], summary["backends"]["combine"]) == (
        len(names),
        str(models / "out"),
        "native",
    )
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times == sorted(times)
    assert abs((datetime.now(timezone.utc) - times[-1]).total_seconds()) < 60

    assert pymerge(*args).code == 0
    more = lines(log.read_text())[len(events) :]
    assert [event["event"] for event in more] == ["plan", "warning", "already_done"]


def test_resuming_and_damage_are_told(tmp_path: Path) -> None:
    # The last of four files is larger than the limit.
    base = {f"{letter}.weight": torch.ones(16, 200) for letter in "abc"} | {"d.weight": torch.ones(200, 200)}
    write_models(tmp_path, base, config={"model_type": "x"})
    args = ("merge", write_config(tmp_path, "linear"), tmp_path / "out", "--max-shard-size", "20KB")
    done = pymerge(*args, before=functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (40_000, 40_000)))
    assert done.code == 8
    kept = sorted(file.name for file in (tmp_path / "out/.pymerge").glob("*.safetensors"))
    assert len(kept) == 3
    file = tmp_path / "out/.pymerge" / kept[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = pymerge(*args, "--log-json", "-", "--quiet")
    assert done.code == 0, done
    events = lines(done.err)
    (checking,) = named(events, "checking_shards")
    assert (checking["shards"], checking["bytes"]) == (kept, 3 * len(data))
    (damaged,) = named(events, "shard_damaged")
    assert (damaged["file"], damaged["level"]) == (kept[0], "warning")
    (resumed,) = named(events, "resumed")
    assert resumed["shards"] == kept[1:]


def test_an_error_is_told_with_its_class(models: Path) -> None:
    write_config(models, "linear", more="extra_tensors: error")
    log = models / "log"
    for command in (("merge", models / "merge.yml", models / "out"), ("plan", models / "merge.yml")):
        done = pymerge(*command, "--log-json", log)
        assert done.code == 4
        (error,) = lines(log.read_text())[-1:]
        assert (error["event"], error["level"], error["error"]) == ("error", "error", "PlanError")
        assert "value_head.weight" in error["message"]


def test_plan_and_verify_tell_what_they_find(models: Path) -> None:
    assert pymerge("merge", models / "merge.yml", models / "out").code == 0
    log = models / "log"
    assert pymerge("plan", models / "merge.yml", "--log-json", log).code == 0
    assert pymerge("verify", models / "out", "--deep", "3", "--log-json", log).code == 0
    plan, *_, recomputed, verified = lines(log.read_text())
    assert plan["event"] == "plan"
    assert plan["peak_memory"] > 0
    assert (recomputed["event"], len(recomputed["tensors"]), recomputed["problems"]) == ("recomputed", 3, [])
    assert (verified["event"], verified["parameters"]) == ("verified", plan["parameters"])


def test_a_log_that_cannot_be_written(models: Path) -> None:
    done = pymerge("merge", models / "merge.yml", models / "out", "--log-json", models / "none/log")
    assert done.code == 8
    assert f"{models / 'none/log'}: cannot be opened for the log" in done.errors[0]
    assert not (models / "out").exists()
    done = pymerge("merge", models / "merge.yml", models / "out", "--log-json", "/dev/full")
    assert done.code == 8
    assert len(done.errors) == 1
    assert "/dev/full: the log cannot be written (No space left on device)" in done.errors[0]


def test_the_first_error_is_the_one_that_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), recording(str(tmp_path / "log")):
        raise ValueError("mine")
    (line,) = lines((tmp_path / "log").read_text())
    assert (line["error"], line["message"]) == ("ValueError", "mine")
    with pytest.raises(ValueError, match="mine"), recording("/dev/full"):
        raise ValueError("mine")


def test_nothing_is_left_behind_and_nothing_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = (logger.level, list(logger.handlers))
    with recording(str(tmp_path / "log"), verbose=True):
        event("x", "a text", level=logging.DEBUG, path=Path("p"), value=float("inf"))
    assert (logger.level, list(logger.handlers)) == before
    event("y", "not shown", level=logging.ERROR)
    assert capsys.readouterr().err == ""
    (line,) = lines((tmp_path / "log").read_text())
    assert (line["message"], line["path"], line["level"]) == ("a text", "p", "debug")
    with pytest.raises(OutputError, match="cannot be opened"), recording(str(tmp_path)):
        pass
