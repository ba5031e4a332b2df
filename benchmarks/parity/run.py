"""Merges small models with pymerge and with mergekit, by every method of mergekit, and compares tensor by tensor.

    python -m benchmarks parity [--match TEXT] [--keep FOLDER]

mergekit is installed into an environment of its own, once. In float32 both read float32 models and compute in float32;
in bfloat16 both read bfloat16 models, and mergekit computes in float32 and writes bfloat16, which pymerge always does.
Differences are counted in units in the last place, of the largest of the two results and of the inputs at that
element, since rounding errors of inputs and deltas have their size (for slices: of the tensor's root mean square).
mergekit computes the same in float64, too: "rounding" means that pymerge's result is more than one unit from
mergekit's, and its error against float64 at most one unit, or twice mergekit's. Of equal magnitudes at the edge of what
is kept any may be: those elements are left out, and counted. Random masks are not the same: of those, shares of changed
elements and lengths of the merged task vectors are compared. Rows of gathered vocabularies are compared by token: ids
of new ones differ from run to run in mergekit. Exit code 1 if a case differs for a reason that
docs/migration.md does not give (`EXPLAINED`). Results go to benchmarks/runs/<machine>/<date>-parity.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

import pymerge
from benchmarks.harness import commands, environments
from benchmarks.harness.results import ResultsFile
from benchmarks.parity.cases import Case, cases

PEER = Path(__file__).with_name("peer.py")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_ULPS = 1.0
MOST_ERROR = 2.0  # of pymerge's error against float64, relative to mergekit's: the rule for every op
MOST_DEVIATIONS = 5.0  # standard deviations between what two random masks give
# Cases that differ for a reason, by a pattern of "family dtype: name"; docs/migration.md says more.
EXPLAINED = {
    r"bfloat16: sce, select_topk": "of equal variances at the edge of what is selected, any may be",
}

# Of the family whose models have vocabularies of their own.
TOKEN_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
Row = dict[str, Any]


def theirs(dtype: str) -> dict[str, dict[str, str]]:
    """The dtypes of mergekit's merges, by the folder they go to."""
    return {
        "theirs": {"dtype": "float32", "out_dtype": dtype},
        "exact": {"dtype": "float64", "out_dtype": "float64"},
    }


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


def vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and ids of an output."""
    document = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    return {**document["model"]["vocab"], **added}


def spacing(like: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The unit in the last place of `like`'s dtype at the largest of the values at each element."""
    size = torch.stack([value.double().abs() for value in values]).amax(dim=0)
    return torch.exp2(torch.floor(torch.log2(size.clamp(min=1e-30)))) * torch.finfo(like.dtype).eps


def compare(case: Case, dtype: str, ours: Path, theirs: Path, models: Path) -> Row:
    """What a case's outputs differ in."""
    mine, other = Tensors(ours), Tensors(theirs)
    row: Row = {"missing": sorted(set(other) - set(mine)), "extra": sorted(set(mine) - set(other))}
    inputs = {folder.name: Tensors(folder) for folder in sorted(models.iterdir())}
    exact = Tensors(theirs.with_name("exact"))
    worst: tuple[float, str] = (0.0, "")
    elements = beyond = undecided = 0
    deviations = own = other_own = 0.0
    for name in sorted(set(mine) & set(other)):
        a, b = mine[name], other[name]
        if a.shape != b.shape or a.dtype != b.dtype or a.dtype != DTYPES[dtype]:
            return row | {"problem": f"{name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"}
        if case.random:
            deviations = max(deviations, statistic(a, b, inputs["base"][name]))
            continue
        other_exact = exact[name]
        if case.gathers and name in TOKEN_TABLES:
            if set(ids := vocabulary(ours)) != set(other_ids := vocabulary(theirs)):
                return row | {"problem": f"other tokens: {sorted(set(ids) ^ set(other_ids))}"}
            places = torch.arange(len(a))
            places[list(ids.values())] = torch.tensor([other_ids[token] for token in ids])
            b, other_exact = b[places], other_exact[places]
        plain = "models" in case.document and not case.gathers
        near = {model: tensors[name] for model, tensors in inputs.items()} if plain else {}
        unit = spacing(a, [a, b, *near.values()] if near else [b.double().square().mean().sqrt().expand_as(b)])
        either = on_the_edge(case, near)
        found = ((a.double() - b.double()).abs() / unit).masked_fill(either, 0.0)
        elements, beyond = elements + a.numel(), beyond + int((found > MOST_ULPS).sum())
        undecided += int(either.sum())
        worst = max(worst, (largest(found), name))
        own = max(own, largest(((a.double() - other_exact).abs() / unit).masked_fill(either, 0.0)))
        other_own = max(other_own, largest(((b.double() - other_exact).abs() / unit).masked_fill(either, 0.0)))
    if case.random:
        return row | {"deviations": deviations, "agrees": deviations <= MOST_DEVIATIONS}
    counts = {"elements": elements, "beyond": beyond, "undecided": undecided}
    errors = {
        "error": own,
        "mergekits_error": other_own,
        "within_rounding": own <= max(MOST_ULPS, MOST_ERROR * other_own),
    }
    return row | {"ulps": worst[0], "worst": worst[1], **counts, **errors, "agrees": beyond == 0}


def largest(values: Tensor) -> float:
    """The largest value; 0 of none."""
    return float(values.max()) if values.numel() else 0.0


def statistic(ours: Tensor, theirs: Tensor, base: Tensor) -> float:
    """How far apart two random merges are, in standard deviations: shares of changed elements, lengths of deltas."""
    deltas = [(tensor.double() - base.double()).flatten() for tensor in (ours, theirs)]
    shares = [float((delta != 0).double().mean()) for delta in deltas]
    share, numel = sum(shares) / 2, base.numel()
    if share in (0.0, 1.0):
        return 0.0
    apart = abs(shares[0] - shares[1]) / (2 * share * (1 - share) / numel) ** 0.5
    squares = [float(delta.square().sum()) for delta in deltas]
    # Gaussian deltas: the fourth moment is 3. Rescaled sums, whose error is smaller, are held to the same.
    spread = (2 * (3 / share - 1) / numel) ** 0.5
    return max(apart, abs(squares[0] - squares[1]) / (sum(squares) / 2) / spread)


def on_the_edge(case: Case, models: Mapping[str, Tensor]) -> Tensor:
    """Elements whose magnitude, in some task vector, is that of the last one kept and of the first one dropped."""
    base = models.get("base")
    found = torch.zeros(base.shape if base is not None else (), dtype=torch.bool)
    for entry in case.document.get("models", ()):
        shares = entry.get("parameters", {})
        if "density" not in shares or base is None:
            continue
        sizes = (models[entry["model"]].float() - base.float()).abs()
        ordered, numel = sizes.flatten().sort(descending=True).values, base.numel()
        kept, first = int(shares["density"] * numel), int(shares.get("gamma", 0.0) * numel)
        first = min(first, numel - kept)
        for edge in (first, first + kept):
            if 0 < edge < numel and ordered[edge - 1] == ordered[edge]:
                found |= sizes == ordered[edge]
    return found


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
    """ "equal", "rounding", "explained" or "differs"."""
    reasons = [
        reason for pattern, reason in EXPLAINED.items() if re.search(pattern, f"{case.family} {dtype}: {case.name}")
    ]
    if row["missing"] or row["extra"]:
        return "differs"
    if row.get("agrees", False):
        return "equal"
    if row.get("within_rounding", False):
        return "rounding"
    return f"explained: {reasons[0]}" if reasons else "differs"


def main(arguments: Sequence[str]) -> None:
    """Run the check."""
    parser = commands.parser("benchmarks.parity.run", __doc__)
    parser.add_argument(
        "--match", default="", help='only cases whose "family dtype: name" this regular expression finds'
    )
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    options = parser.parse_args(arguments)
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
                for name, settings in theirs(dtype).items():
                    (folder / f"{name}.yml").write_text(case.text(place, settings))
                    if name == "theirs" or not case.random:
                        seed = 0 if case.random else None
                        jobs.append({"config": str(folder / f"{name}.yml"), "out": str(folder / name), "seed": seed})
                chosen.append((case, dtype, folder))
    said = ask_mergekit(binaries / "python", jobs, work)
    problems = {job["out"]: problem for job, problem in zip(jobs, said, strict=True)}

    results = ResultsFile("parity", options=vars(options), mergekit=environments.versions(binaries))
    for case, dtype, folder in chosen:
        problem = problems[str(folder / "theirs")]
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
        worst = ""
        if row.get("worst"):
            worst = f"{row['ulps']:.2g}; to float64 {row['error']:.2g}, mergekit {row['mergekits_error']:.2g}"
        if "deviations" in row:
            worst = f"{row['deviations']:.1f} standard deviations"
        problem = row.get("mergekit") or row.get("pymerge") or row.get("problem") or ""
        found.add_row(row["case"], row["dtype"], row["family"], row["verdict"], worst or problem[:70])
    return found
