"""The demo's scores: tables of README.md and of the example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.tables.page import Block, Part, table
from benchmarks.tables.quoted import run

TASKS = ("digits", "latin", "greek", "cyrillic", "hebrew")
README = {
    "base": "base",
    "individual": "individual experts",
    "average": "simple average",
    "task_arithmetic": "task arithmetic, 0.4 (best on validation)",
    "wudi": "wudi, published lr 1e-5",
    "wudi_auto": "wudi, `lr: auto`",
    "wudi_flow": "wudi_flow, t = 300",
    "ace": "ace, eps 1e-5",
}
EXAMPLE = {
    "base": "base",
    "individual": "individual",
    "average": "average",
    "task_arithmetic": "task_arithmetic, weight 0.4",
    "wudi": "wudi, lr 1e-5 as published",
    "wudi_auto": "wudi, lr auto",
    "wudi_flow": "wudi_flow, t = 300",
    "ace": "ace, eps 1e-5",
}
ADAPTERS = {
    "base": "base",
    "individual experts": "individual experts",
    "individual adapters": "individual adapters, rank 16",
    "task_arithmetic": "task_arithmetic, weight 0.4",
    "ties": "ties, weight 0.5, density 0.5",
    "knots": "knots",
    "core_space": "core_space",
    "tsv_m": "tsv_m",
    "iso_c": "iso_c, mean_over rank",
    "wudi_flow": "wudi_flow",
}


def parts() -> Iterator[Part]:
    """What is quoted of them."""
    yield Block("README.md", "demo", scores("demo", README))
    yield Block("examples/glyphs/README.md", "demo", scores("demo", EXAMPLE))
    yield Block("examples/glyphs/README.md", "adapters", scores("adapters_demo", ADAPTERS))


def scores(suite: str, names: Mapping[str, str]) -> list[str]:
    """Accuracies in percent by model and task."""
    found = run(suite)["rows"]
    columns = (*TASKS, "mean")
    rows = [[said, *(f"{found[name][column]:.2f}" for column in columns)] for name, said in names.items()]
    return table(["", *columns], rows)
