"""The profile of a merge: spans that nest, every byte in them, and the overlap that the summary tells."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pymerge import api
from pymerge.engine.report import MergeReport
from pymerge.engine.trace import Tracer
from tests.helpers.checkpoints import pymerge, refused, tree, write_config, write_models

LAYERS = 24
Events = list[dict[str, Any]]


class Profile(NamedTuple):
    report: MergeReport
    spans: Events
    threads: dict[int, str]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A merge that computes most of the time, in three shards, layer by layer."""
    return profiled(tmp_path_factory.mktemp("profile"), 1, "wudi", iterations=40)


def profiled(folder: Path, threads: int, method: str, **parameters: Any) -> Profile:
    write_models(folder, {f"model.layers.{n:02d}.mlp.up_proj.weight": torch.randn(192, 192) for n in range(LAYERS)})
    config = write_config(folder, method, **parameters)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(threads))
        report = api.merge(
            config, folder / "out", device="cpu", progress=False, max_shard_size="1.2MB", profile=folder / "trace.json"
        )
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    events: Events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return Profile(report, [event for event in events if event["ph"] == "X"], threads)


def test_every_byte_is_in_a_span(profile: Profile) -> None:
    moved: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    for span in profile.spans:
        moved[span["cat"]] += span["args"]["bytes"]
        counts[span["cat"]] += 1
    assert moved["read"] == profile.report.bytes_read == 3 * LAYERS * 4 * 192 * 192
    assert moved["write"] == moved["hash"] == profile.report.bytes_written == LAYERS * 4 * 192 * 192
    assert (counts["read"], counts["compute"], counts["write"], counts["step"]) == (3 * LAYERS, LAYERS, LAYERS, LAYERS)
    names = {span["name"] for span in profile.spans if span["cat"] != "wait for the writer"}
    assert len(names) == LAYERS


def test_spans_of_a_thread_are_disjoint_or_nested(profile: Profile) -> None:
    for thread in profile.threads:
        spans = [(s["ts"], -s["dur"], s["cat"]) for s in profile.spans if s["tid"] == thread]
        open_until: list[float] = []
        for start, minus, _ in sorted(spans):
            end = start - minus
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-3
            open_until.append(end)


def test_kinds_have_their_threads(profile: Profile) -> None:
    by_thread: dict[str, set[str]] = defaultdict(set)
    for span in profile.spans:
        by_thread[profile.threads[span["tid"]].partition("_")[0]].add(span["cat"])
    main = by_thread.pop("MainThread")
    assert (
        {"step", "compute", "wait for inputs"} <= main <= {"step", "compute", "wait for inputs", "wait for the writer"}
    )
    assert by_thread == {
        "pymerge-read": {"read"},
        "pymerge-hand-on": {"hand on"},
        "pymerge-write": {"write"},
        "pymerge-hash": {"hash"},
    }


def test_small_layers_are_solved_side_by_side_to_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(3)
    abreast = profiled(tmp_path / "two", 2, "tsv_m")
    solving = [span for span in abreast.spans if span["cat"] == "solve"]
    names = [span["name"] for span in solving]
    assert len(set(names)) == len(names) >= LAYERS - 4  # the last one of a shard may be alone
    assert {abreast.threads[span["tid"]].partition("_")[0] for span in solving} == {"pymerge-solve"}
    by_thread = Counter(span["tid"] for span in solving)
    assert len(by_thread) == 2
    assert min(by_thread.values()) >= LAYERS // 4
    torch.manual_seed(3)
    alone = profiled(tmp_path / "one", 1, "tsv_m")
    assert not any(span["cat"] == "solve" for span in alone.spans)
    two, one = (
        {name: data for name, data in tree(tmp_path / folder / "out").items() if name.endswith(".safetensors")}
        for folder in ("two", "one")
    )
    assert len(one) >= 3
    assert two == one


def test_overlap_is_what_the_spans_say(profile: Profile) -> None:
    edges = sorted(
        edge
        for span in profile.spans
        for edge in ((span["ts"], 1, span["cat"]), (span["ts"] + span["dur"], -1, span["cat"]))
    )
    active: dict[str, int] = defaultdict(int)
    io = hidden = last = 0.0
    for time, change, kind in edges:
        if active["read"] or active["write"]:
            io += time - last
            hidden += (time - last) * bool(active["compute"])
        active[kind] += change
        last = time
    assert profile.report.overlap == pytest.approx(hidden / io, abs=1e-3)
    assert 0.0 < profile.report.overlap <= 1.0
    summary = " ".join(profile.report.lines())
    assert f"{profile.report.overlap:.0%} of the file access ran beside computing" in summary


def test_the_slowest_tensors_and_the_sums(profile: Profile) -> None:
    seconds: dict[str, float] = defaultdict(float)
    for span in profile.spans:
        if span["cat"] in ("read", "compute", "hand on", "write"):
            seconds[span["name"]] += span["dur"] / 1e6
    expected = sorted(seconds, key=lambda name: -seconds[name])[:10]
    assert [step.name for step in profile.report.slowest] == expected
    assert [step.total for step in profile.report.slowest] == pytest.approx([seconds[name] for name in expected])
    computing = sum(span["dur"] for span in profile.spans if span["cat"] == "compute") / 1e6
    assert profile.report.computing == pytest.approx(computing)


def test_a_span_that_fails_ends() -> None:
    with Tracer() as tracer:
        with pytest.raises(KeyError), tracer.span("compute", "a"):
            raise KeyError("a")
        with tracer.span("read", "a"):
            pass
    assert tracer.overlap == 0.0
    assert tracer.seconds("compute") > 0.0
    assert [step.name for step in tracer.slowest()] == ["a"]


@pytest.mark.parametrize(("method", "expected"), [("linear", {"combine"}), ("wudi_flow", {"read", "compute"})])
def test_the_option(tmp_path: Path, method: str, expected: set[str]) -> None:
    models = write_models(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.randn(32, 32)})
    config = write_config(models, method)
    assert pymerge("merge", config, models / "plain").code == 0
    done = pymerge("merge", config, models / "traced", "--profile", models / "trace.json")
    assert done.code == 0, done
    assert tree(models / "traced") == tree(models / "plain")
    kinds = {event.get("cat") for event in json.loads((models / "trace.json").read_text())["traceEvents"]}
    assert expected | {"write", "step"} <= kinds


def test_a_profile_that_cannot_be_written_is_refused_before_work_begins(tmp_path: Path) -> None:
    models = write_models(tmp_path, {"model.norm.weight": torch.ones(8)})
    write_config(models, "linear")
    where = models / "missing/trace.json"
    refused(models, 8, where, "the profile cannot be written", "give another path", args=("--profile", str(where)))
