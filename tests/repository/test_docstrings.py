"""The first word of a docstring says what a thing is or does: a noun, or a verb."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Clauses hide the noun: "Remedy for a format", not "What to do about a format".
CLAUSES = {"What", "How", "Where", "Which", "Who", "Those", "That", "These", "Of", "As", "In", "On", "To"}


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    found, wrong = 0, []
    for folder in ("pymerge", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                    found += 1
                    if text.split()[0] in CLAUSES:
                        wrong.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found > 1000
    assert wrong == []
