"""`python -m pymerge` is the `pymerge` command."""

from __future__ import annotations

from pymerge.cli.main import main

main()
