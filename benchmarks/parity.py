"""Merges small models with pymerge and with mergekit, by every method of mergekit, and compares tensor by tensor.

    python benchmarks/parity.py [--match TEXT] [--keep FOLDER]

mergekit is installed into an environment of its own, once. In float32 both read float32 models and compute in float32;
in bfloat16 both read bfloat16 models, and mergekit computes in float32 and writes bfloat16, which pymerge always does.
Differences are counted in units in the last place (of the largest of the two results and of the inputs at that
element, since rounding errors of inputs and deltas have their size). Random masks are not the same: of those, shares
of changed elements and lengths of the merged task vectors are compared. Exit code 1 if a case differs for a reason
that docs/migration.md does not give (`EXPLAINED`). Results go to benchmarks/results/<machine>/<date>-parity.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import environments
import torch
from parity_cases import Case, cases
from results_file import ResultsFile
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

import pymerge

PEER = Path(__file__).with_name("parity_peer.py")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_ULPS = 1.0
# Of random masks: difference of kept shares in standard deviations, and of lengths of the merged task vectors.
MOST_DEVIATIONS, MOST_LENGTH = 5.0, 0.05
# Cases that differ for a reason, by a pattern of "family: name": docs/migration.md has the reasons.
EXPLAINED: dict[str, str] = {}

Row = dict[str, Any]


class Tensors:
    """The tensors of a model directory, whatever its files."""

    def __init__(self, folder: Path) -> None:
        self._where = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self._where |= dict.fromkeys(opened.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._where[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


def ulps(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """|ours - theirs| in units in the last place of the largest value at each element."""
    largest = torch.stack([tensor.double().abs() for tensor in (ours, theirs, *inputs)]).amax(dim=0)
    spacing = torch.exp2(torch.floor(torch.log2(largest.clamp(min=1e-30)))) * torch.finfo(ours.dtype).eps
    return (ours.double() - theirs.double()).abs() / spacing


def compare(case: Case, dtype: str, ours: Path, theirs: Path, models: Path) -> Row:
    """What a case's outputs differ in."""
    mine, other = Tensors(ours), Tensors(theirs)
    row: Row = {"missing": sorted(set(other) - set(mine)), "extra": sorted(set(mine) - set(other))}
    inputs = [Tensors(folder) for folder in sorted(models.iterdir())]
    worst: tuple[float, str] = (0.0, "")
    elements = beyond = 0
    deviations = lengths = 0.0
    for name in sorted(set(mine) & set(other)):
        a, b = mine[name], other[name]
        if a.shape != b.shape or a.dtype != b.dtype or a.dtype != DTYPES[dtype]:
            return row | {"problem": f"{name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"}
        if case.random:
            base = inputs[0][name].double()
            shares = [float((tensor.double() != base).double().mean()) for tensor in (a, b)]
            share = sum(shares) / 2
            sigma = (2 * share * (1 - share) / a.numel()) ** 0.5
            deviations = max(deviations, abs(shares[0] - shares[1]) / sigma if sigma else float(shares[0] != shares[1]))
            if a.numel() > 2000:
                norms = [float((tensor.double() - base).norm()) for tensor in (a, b)]
                lengths = max(lengths, abs(norms[0] / norms[1] - 1))
            continue
        near = [tensors[name] for tensors in inputs if name in tensors] if "slices" not in case.document else []
        found = ulps(a, b, near)
        elements, beyond = elements + a.numel(), beyond + int((found > MOST_ULPS).sum())
        worst = max(worst, (float(found.max()) if found.numel() else 0.0, name))
    if case.random:
        agrees = deviations <= MOST_DEVIATIONS and lengths <= MOST_LENGTH
        return row | {"deviations": deviations, "length_difference": lengths, "agrees": agrees}
    return row | {"ulps": worst[0], "worst": worst[1], "elements": elements, "beyond": beyond, "agrees": beyond == 0}


def ask_mergekit(python: Path, jobs: list[Row], folder: Path) -> list[str | None]:
    """Run the jobs in mergekit's environment; None for each that worked, or its error."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    done = subprocess.run([python, PEER, "run", listed], capture_output=True, text=True, check=False)
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("answer ")]
    if len(answers) != len(jobs):
        raise SystemExit(f"mergekit stopped after {len(answers)} of {len(jobs)} merges:\n{done.stderr[-2000:]}")
    return answers


def judge(case: Case, dtype: str, row: Row) -> str:
    """ "equal", "explained" or "differs"."""
    reasons = [
        reason for pattern, reason in EXPLAINED.items() if re.search(pattern, f"{case.family} {dtype}: {case.name}")
    ]
    fine = row.get("agrees", False) and not row["missing"] and not row["extra"]
    return "equal" if fine else f"explained: {reasons[0]}" if reasons else "differs"


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--match", default="", help='only cases whose "family dtype: name" this regular expression finds'
    )
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    options = parser.parse_args()
    work = options.keep or Path(tempfile.mkdtemp(prefix="parity-"))
    binaries = environments.environment(environments.MERGEKIT)
    models = work / "models"
    if not models.exists():
        subprocess.run([binaries / "python", PEER, "make", models], check=True)

    chosen: list[tuple[Case, str, Path]] = []
    jobs: list[Row] = []
    for case in cases():
        for dtype in DTYPES:
            if re.search(options.match, f"{case.family} {dtype}: {case.name}"):
                folder = work / "cases" / f"{len(chosen):03d}"
                (folder / "ours").mkdir(parents=True, exist_ok=True)
                place = str(models / case.family) + ("-bf16" if dtype == "bfloat16" else "")
                (folder / "ours.yml").write_text(case.text(place, {"dtype": dtype}))
                (folder / "theirs.yml").write_text(case.text(place, {"dtype": "float32", "out_dtype": dtype}))
                jobs.append(
                    {
                        "config": str(folder / "theirs.yml"),
                        "out": str(folder / "theirs"),
                        "seed": 0 if case.random else None,
                    }
                )
                chosen.append((case, dtype, folder))
    answers = ask_mergekit(binaries / "python", jobs, work)

    results = ResultsFile("parity", options=vars(options), mergekit=environments.versions(binaries))
    for (case, dtype, folder), problem in zip(chosen, answers, strict=True):
        row: Row = {"family": case.family, "dtype": dtype, "case": case.name, "mergekit": problem}
        try:
            pymerge.merge(folder / "ours.yml", folder / "ours", progress=False)
        except pymerge.PymergeError as error:
            row["pymerge"] = str(error)
        if problem is None and "pymerge" not in row:
            place = models / (case.family + ("-bf16" if dtype == "bfloat16" else ""))
            row |= compare(case, dtype, folder / "ours", folder / "theirs", place)
        row["verdict"] = (
            "mergekit fails" if problem else "pymerge fails" if "pymerge" in row else judge(case, dtype, row)
        )
        results.rows.append(row)
    results.write()
    Console(width=150).print(table(results.rows))
    bad = [row for row in results.rows if row["verdict"] in ("differs", "pymerge fails")]
    print(f"{len(results.rows)} cases, {len(bad)} to look at; written to {results.path}")
    if bad:
        raise SystemExit(1)


def table(rows: Sequence[Row]) -> Table:
    """A row for each case and dtype, families side by side."""
    found = Table("case", "dtype", "family", "verdict", "worst", title_justify="left")
    for row in rows:
        worst = f"{row['ulps']:.2g} ulp, {row['worst']}" if row.get("worst") else ""
        if "deviations" in row:
            worst = f"{row['deviations']:.1f} sigma, length {row['length_difference']:.1%}"
        problem = row.get("mergekit") or row.get("pymerge") or row.get("problem") or ""
        found.add_row(row["case"], row["dtype"], row["family"], row["verdict"], worst or problem[:70])
    return found


if __name__ == "__main__":
    main()
