"""The half of the benchmark that runs where mergekit is installed beside pymerge.

    python -m benchmarks.integrations.peer CONFIG.yml FOLDER REPEAT

The answer is a line of JSON on standard output: seconds of each form, and the largest difference of their tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mergekit.merge
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors import safe_open

from pymerge.integrations.mergekit import replace_engine, restore_engine

FORMS = {"mergekit": restore_engine, "pymerge": replace_engine}


def merge(form: str, document: dict[str, Any], out: Path) -> float:
    """Seconds of one merge."""
    FORMS[form]()
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what the one before left to write is not this one's
    start = time.perf_counter()
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    mergekit.merge.run_merge(MergeConfiguration.model_validate(document), str(out), options)
    return time.perf_counter() - start


def places(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def difference(one: Path, two: Path) -> float:
    """The largest difference of two outputs' tensors; SystemExit if they are not of the same names and shapes."""
    first, second = places(one), places(two)
    # A head that is tied to the embedding is written by mergekit, too.
    if first.keys() - {"lm_head.weight"} != second.keys() - {"lm_head.weight"}:
        raise SystemExit(f"tensors of one output alone: {sorted(first.keys() ^ second.keys())[:5]}")
    largest = 0.0
    for name in first.keys() & second.keys():
        with safe_open(first[name], "pt") as a, safe_open(second[name], "pt") as b:
            left, right = a.get_tensor(name), b.get_tensor(name)
        if left.shape != right.shape:
            raise SystemExit(f"{name}: {tuple(left.shape)} and {tuple(right.shape)}")
        largest = max(largest, float((left.float() - right.float()).abs().max()))
    return largest


def main() -> None:
    """Compare, then time."""
    file, folder, repeat = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    document = yaml.safe_load(file.read_text())
    outs = {form: folder / form for form in FORMS}
    for form, out in outs.items():
        merge(form, document, out)
    answer: dict[str, Any] = {"difference": difference(*outs.values()), "threads": torch.get_num_threads()}
    walls: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(repeat):
        for form, out in outs.items():
            walls[form].append(merge(form, document, out))
    for form, out in outs.items():
        shutil.rmtree(out)
        answer[form] = {"min": min(walls[form]), "median": statistics.median(walls[form]), "calls": repeat}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
