"""A missing library, or one of a version that does not fit, is one line with the command that installs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pymerge
from pymerge.common import libraries
from pymerge.common.libraries import LIBRARIES, require
from pymerge.errors import ArgumentError
from pymerge.integrations import fusion_bench
from pymerge.integrations.mergekit import __main__ as mergekit_commands
from pymerge.integrations.mergekit import register_methods, replace_engine

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.mark.parametrize("extra", LIBRARIES)
def test_the_versions_are_those_of_the_extras(extra: str) -> None:
    wanted = [f"{package}>={least}" + (f",<{below}" if below else "") for package, least, below in LIBRARIES[extra]]
    assert f"{extra} = {json.dumps(wanted)}" in PROJECT.read_text()


@pytest.mark.parametrize("extra", LIBRARIES)
def test_a_library_that_does_not_fit_is_one_line_with_the_command(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, _, below = LIBRARIES[extra][0]
    fitting = {name: "99" if below is None else f"{least}.post1" for name, least, below in LIBRARIES[extra]}

    for version in ("0.0.1", *([below] if below else [])):
        monkeypatch.setattr(libraries, "version", lambda name, version=version: version)
        with pytest.raises(ArgumentError, match=re.escape(f"{package} {version} is installed")) as raised:
            require(extra)
        assert str(raised.value).endswith(f"pip install 'pymerge-engine[{extra}]'")
        assert "\n" not in str(raised.value)
    monkeypatch.setattr(libraries, "version", partial(_version, None))
    with pytest.raises(ArgumentError, match=f"{package} is not installed; pip install 'pymerge-engine"):
        require(extra)
    monkeypatch.setattr(libraries, "version", fitting.__getitem__)
    require(extra)


def _adapters() -> Any:
    from pymerge.integrations.peft import add_merged_adapter

    return add_merged_adapter(nn.Linear(2, 2), ["one"], "two")


def _adapters_into() -> Any:
    from pymerge.integrations.peft import merge_adapters_into

    return merge_adapters_into(nn.Linear(2, 2), ["one"])


def _map() -> Any:
    merger = pymerge.Merger({"a.weight": torch.ones(2, 2)}, [{"a.weight": torch.zeros(2, 2)}], "task_arithmetic")
    return pymerge.search.map(merger, lambda tensors: [1.0])


ENTRANCES: dict[str, tuple[str, Callable[[], Any]]] = {
    "replace_engine": ("mergekit", replace_engine),
    "register_methods": ("mergekit", register_methods),
    "fusion_bench": ("fusion-bench", lambda: fusion_bench.Merge),
    "add_merged_adapter": ("peft", _adapters),
    "merge_adapters_into": ("peft", _adapters_into),
    "search.map": ("search", _map),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("found", [None, "0.0.1"])
def test_every_entrance_looks_first(entrance: str, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, call = ENTRANCES[entrance]
    monkeypatch.setattr(libraries, "version", partial(_version, found))
    with pytest.raises(ArgumentError, match=rf"^{LIBRARIES[extra][0][0]} .*; pip install 'pymerge-engine\[{extra}\]'$"):
        call()


@pytest.mark.parametrize(("command", "extra"), [("yaml", "mergekit"), ("evolve", "evolve")])
def test_a_command_says_so_in_one_line(
    command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(libraries, "version", partial(_version, None))
    with pytest.raises(SystemExit) as ended:
        mergekit_commands.main([command, "config.yml", "out"])
    assert ended.value.code == ArgumentError.exit_code
    said = f"error: mergekit is not installed; pip install 'pymerge-engine[{extra}]'\n"
    assert capsys.readouterr().err == said


def _version(found: str | None, name: str) -> str:
    if found is None:
        raise PackageNotFoundError(name)
    return found
