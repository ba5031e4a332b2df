"""A missing library, or one of a version that does not fit, is one line with the command that installs it."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pymerge.common import libraries
from pymerge.common.libraries import LIBRARIES, require
from pymerge.errors import ArgumentError

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.mark.parametrize("extra", LIBRARIES)
def test_the_versions_are_those_of_the_extras(extra: str) -> None:
    wanted = [f"{package}>={least}" + (f",<{below}" if below else "") for package, least, below in LIBRARIES[extra]]
    assert f"{extra} = {json.dumps(wanted)}" in PROJECT.read_text()


@pytest.mark.parametrize("extra", LIBRARIES)
def test_a_library_that_does_not_fit_is_one_line_with_the_command(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, least, below = LIBRARIES[extra][0]

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    for version in ("0.0.1", *([below] if below else [])):
        monkeypatch.setattr(libraries, "version", lambda name, version=version: version)
        with pytest.raises(ArgumentError, match=re.escape(f"{package} {version} is installed")) as raised:
            require(extra)
        assert str(raised.value).endswith(f"pip install 'pymerge-engine[{extra}]'")
        assert "\n" not in str(raised.value)
    monkeypatch.setattr(libraries, "version", missing)
    with pytest.raises(ArgumentError, match=f"{package} is not installed; pip install 'pymerge-engine"):
        require(extra)
    monkeypatch.setattr(libraries, "version", lambda name: "99" if below is None else f"{least}.post1")
    require(extra)
