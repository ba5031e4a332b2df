"""README.md, the docs and the other pages say what benchmarks/results hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness import results
from benchmarks.tables import page, run
from benchmarks.tables.page import Block, Said
from benchmarks.tables.take import take

ROOT = Path(__file__).resolve().parents[2]


def test_pages_say_what_the_results_say() -> None:
    changes = run.differences()
    assert not changes, f"run `python -m benchmarks tables`:\n{changes}"


def test_every_table_between_markers_is_written() -> None:
    written = {(part.page, part.name) for part in run.parts() if isinstance(part, Block)}
    pages = {part.page for part in run.parts()}
    marked = {
        (name, line.removeprefix("<!-- table: ").removesuffix(" -->"))
        for name in pages
        for line in (ROOT / name).read_text().splitlines()
        if line.startswith("<!-- table: ")
    }
    assert marked == written


def test_every_run_is_of_a_suite_and_says_where_it_was_measured() -> None:
    for file in results.RESULTS.glob("*/*.json"):
        runs = json.loads(file.read_text())["runs"]
        assert runs, file
        for name, content in runs.items():
            assert results.folder_of(content["machine"]) == file.parent.name, (file, name)
            assert "date" in content or name in ("demo", "adapters_demo"), (file, name)


def test_numbers_of_a_sentence_are_found_and_replaced_wherever_its_lines_break() -> None:
    said = Said("page", "within {} of X, at {} %", ["1.1e-6", "7"])
    assert said.write("ace is within 3e-5\nof X,\n  at 12.5 %.") == "ace is within 1.1e-6\nof X,\n  at 7 %."
    for text in ("nothing of it", "within 1 of X, at 2 % and within 3 of X, at 4 %"):
        with pytest.raises(SystemExit, match="page says"):
            said.write(text)


def test_a_table_is_replaced_between_its_markers() -> None:
    block = Block("page", "speed", page.table(["", "a"], [["x", "1"], ["y", ""]]))
    text = "before\n<!-- table: speed -->\nold\n<!-- end -->\nafter\n"
    expected = "before\n<!-- table: speed -->\n| | a |\n| --- | --- |\n| x | 1 |\n| y | |\n<!-- end -->\nafter\n"
    assert block.write(text) == expected == block.write(expected)
    with pytest.raises(SystemExit, match="0 times"):
        block.write("no table")


def test_a_run_is_taken_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tables.take.RESULTS", tmp_path)
    file = tmp_path / "2030-01-02-merges.json"
    for name in ("ties", "others"):
        results.save(file, {"machine": {"device": "Some CPU, 2 GHz"}, "rows": [name]})
        kept = take(file, run=name)
    assert kept == tmp_path / "some-cpu-2-ghz" / "merges.json"
    assert results.load(kept, "ties")["rows"] == ["ties"] == results.load(kept)["rows"]
    assert results.load(kept, "others")["rows"] == ["others"]
    with pytest.raises(SystemExit, match="ties, others"):
        take(file)
    with pytest.raises(SystemExit, match="no run 'sce'"):
        results.load(kept, "sce")
