"""pymerge as mergekit's engine; run by tests/integrations/test_mergekit.py, with mergekit installed."""

from __future__ import annotations

from pymerge.common.libraries import require


def test_the_library_is_found() -> None:
    require("mergekit")
