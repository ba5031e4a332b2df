"""Files that can be read in one sitting."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 300
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu"}


def test_no_file_of_the_package_or_of_compiled_code_is_long() -> None:
    """A file that would be longer is two, along what it is about."""
    files = [file for folder in ("pymerge", "kernels", "csrc") for file in (ROOT / folder).rglob("*")]
    lines = {file: len(file.read_text().splitlines()) for file in files if file.suffix in SUFFIXES}
    assert len(lines) > 400
    assert {str(file.relative_to(ROOT)): count for file, count in lines.items() if count > MOST_LINES} == {}
