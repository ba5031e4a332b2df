"""Errors, parity, bandwidth, memory, and the counts of torture: numbers in sentences of several pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import ceil

from benchmarks.tables.page import Part, Said, short
from benchmarks.tables.quoted import row, rows

TRUST = "docs/trust.md"
FORMS = ("command", "engine")  # of mergekit's own tests


def parts() -> Iterator[Part]:
    """What is quoted of them."""
    yield from accuracy()
    yield from parity()
    yield from torture()
    share = [found["share"] for found in rows("bandwidth")]
    words = "The C++ `combine` by itself moves {} to {} times the bytes"
    yield Said("README.md", words, [f"{min(share):.1f}", f"{max(share):.1f}"])
    base = [found["base"] for found in rows("memory")]
    yield Said("docs/memory.md", "has it: {} to {} MiB, by method", [str(min(base)), str(max(base))])


def accuracy() -> Iterator[Part]:
    """Relative errors against float64."""
    wudi, wudi32 = (_worst("wudi", precision, "error_of_displacement") for precision in ("auto", "float32"))
    ace, flow = (_worst(method, "auto", "error") for method in ("ace", "wudi_flow"))
    words = "wudi within {} of the displacement from its start, wudi_flow within {} of X, ace within {} of X."
    yield Said("README.md", words, [short(wudi), short(flow), short(ace)])
    words = "float32 products leave an error of up to {} of the displacement, these {}"
    yield Said("docs/methods.md", words, [short(wudi32), short(wudi)])


def _worst(method: str, precision: str, column: str) -> float:
    found = rows("accuracy", method=method, precision=precision)
    return max(float(each[column]) for each in found if each[column] is not None)


def parity() -> Iterator[Part]:
    """Differences from mergekit."""
    page = "docs/migration.md"
    for dtype, words in (
        ("bfloat16", "Of {} cases with bfloat16 models, {} are equal"),
        ("float32", "; of {} in float32, {}. The others"),
    ):
        found = Counter(each["verdict"] for each in rows("parity", dtype=dtype))
        yield Said(page, words, [str(found.total()), str(found["equal"])])
    rounded = [each for each in rows("parity") if each["verdict"] == "rounding"]
    better = sum(each["error"] <= each["mergekits_error"] for each in rounded)
    most = max(each["error"] / each["mergekits_error"] for each in rounded)
    words = "in {} of the {} cases that differ by rounding, and at most {} times mergekit's in all"
    yield Said(page, words, [str(better), str(len(rounded)), f"{ceil(10 * most) / 10:g}"])
    tests = [Counter(each["verdict"] for each in rows("parity-tests", kind="test", form=form)) for form in FORMS]
    words = (
        "tests of whole merges, tokenizers and chat templates: of {}, {} pass with `pymerge` for its merge, {} of {} "
    )
    numbers = [str(number) for found in tests for number in (found.total(), found["passes"])]
    yield Said(page, words + "through `replace_engine`", [*numbers[:2], numbers[3], numbers[2]])


def torture() -> Iterator[Part]:
    """Kills, full disks, damage and fuzzing."""
    killed, stopped = (row("torture", kind=kind) for kind in ("SIGKILL", "SIGTERM"))
    yield Said(TRUST, "| {} kills of {} merges |", [str(killed["stops"]), str(killed["merges"])])
    yield Said(TRUST, "| {} stops of {} merges |", [str(stopped["stops"]), str(stopped["merges"])])
    stages = [str(killed["stage"][name]) for name in ("not begun", "no shard", "some shards", "publishing", "done")]
    words = "SIGKILLs, {} came before the first state was written, {} before the first shard was whole, {} between "
    yield Said(TRUST, words + "shards, {} while files were published, and {} after that", stages)
    full = row("torture", kind="full disk")
    failed = full["failed and went on to the same bytes"]
    yield Said(TRUST, "| {} merges, {} failed with one message |", [str(full["merges"]), str(failed)])
    yield Said(TRUST, "| {} files | each read", [f"{row('torture', kind='damaged')['files']:,}"])
    documents = row("torture", kind="Hypothesis")
    numbers = [f"{documents['documents']:,}", str(documents["files each"])]
    yield Said(TRUST, "| {} documents, {} files each |", numbers)
    fuzzed = row("torture", kind="fuzzer", finding=None)
    numbers = [f"{fuzzed['executions']:,}", str(fuzzed["seconds"])]
    yield Said(TRUST, f"| {{}} executions in {{}} s, at commit {fuzzed['commit']} |", numbers)
