"""Parts: every file is in one of them, the same on every machine; and advice on how many files there should be."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest

from pymerge import api
from pymerge.errors import ArgumentError
from pymerge.planner.parts import assign, count_files, few_files, file_costs, parse_part
from tests.helpers.checkpoints import llama, llama_config, write_config, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = llama(hidden=64, inner=96, blocks=4)
    return write_models(tmp_path_factory.mktemp("models"), base, config=llama_config(base))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("method", "little"), [("linear", "30KB"), ("wudi_flow", "1MB")])
def test_every_file_is_in_one_part_whatever_the_memory(models: Path, method: str, little: str, count: int) -> None:
    config = write_config(models, method)
    plans = [api.plan(config, device="cpu", max_shard_size="50KB", memory=memory) for memory in ("1GiB", little)]
    if method == "linear":
        assert [step.pieces for step in plans[0].steps] != [step.pieces for step in plans[1].steps]
    parts = [assign(plan, count) for plan in plans]
    assert parts[0] == parts[1]
    assert sorted(chain.from_iterable(parts[0])) == sorted(layout.file for layout in plans[0].files)
    costs = file_costs(plans[0].steps, plans[0].files)
    sums = [sum(costs[file] for file in part) for part in parts[0]]
    assert max(sums) - min(sums) <= max(costs.values())


def test_some_files_in_parts(models: Path) -> None:
    plan = api.plan(write_config(models, "linear"), device="cpu", max_shard_size="50KB")
    some = {layout.file for layout in plan.files[::2]}
    assert set(chain.from_iterable(assign(plan, 2, some))) == some


def test_too_few_files_for_the_parts_are_told_with_a_size_that_gives_four_each(models: Path) -> None:
    config = write_config(models, "linear")
    plan = api.plan(config, device="cpu")
    assert few_files(plan, 1) is None
    warning = few_files(plan, 3)
    assert warning is not None
    found = re.search(
        r"3 parts share 1 output file, each taken whole by one.*--max-shard-size (\S+), .* would give (\d+)$", warning
    )
    assert found is not None, warning
    again = api.plan(config, device="cpu", max_shard_size=found[1])
    assert len(again.files) == int(found[2])
    assert 12 <= len(again.files) <= 16
    assert few_files(again, 3) is None
    many = few_files(plan, 20)
    assert many is not None
    assert many.endswith(f"the merge has {plan.tensors} tensors: fewer parts would do")


def test_counts_of_files_are_those_of_layouts(models: Path) -> None:
    config = write_config(models, "linear")
    for size in (1, 5_000, 70_000, 10**7):
        plan = api.plan(config, device="cpu", max_shard_size=size)
        entries = [plan.inputs.donor.tensors[name] for name in plan.inputs.donor.tensors]
        assert count_files([entry.nbytes for entry in entries], size) == len(plan.files)


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "a/b", "1/2/3", "-1/3", "1.0/3", " 1/3"])
def test_parts_that_do_not_exist(text: str) -> None:
    with pytest.raises(ArgumentError):
        parse_part(text)


def test_a_part_by_its_text() -> None:
    assert parse_part("2/3") == (2, 3)
