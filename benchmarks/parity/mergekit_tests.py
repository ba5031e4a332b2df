"""Runs mergekit's own tests of whole merges against pymerge, and its README's configs through pymerge's checks.

    python -m benchmarks parity tests [--keep FOLDER]

The tests come with mergekit's source distribution from PyPI, and are run from there, with mergekit_common.py for the
module that merges: in mergekit's environment with pymerge's command, and in a process that has both, through mergekit's
`run_merge` with pymerge as its engine. The examples folder is not part of the distribution: of example
configs there are those of its README, parts of configs that name models of the Hub: they are read and checked, not
merged.
Results go to benchmarks/runs/<machine>/<date>-parity-tests.json; the exit code is 1 if a test fails for which
`DIFFERS` has no reason, or a config is not understood.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import commands, environments
from benchmarks.harness.results import ResultsFile
from pymerge.config.merge_config import load_config
from pymerge.errors import ConfigError

HERE = Path(__file__).parent
FILES = ("test_basic_merges.py", "test_tokenizer.py", "test_chat_template.py")
# Tests of mergekit that pymerge does not pass, and why: by a pattern of "file::test".
DIFFERS: dict[str, str] = {
    "test_mismatched_vocabulary_requires_alignment": "refused as well, in other words than mergekit's",
}
Row = dict[str, Any]


def source(folder: Path) -> Path:
    """mergekit's source distribution, unpacked."""
    arguments = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", *arguments, "--dest", str(folder), *environments.MERGEKIT]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("mergekit-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


def command() -> tuple[Path, dict[str, str]]:
    """Python and variables for the tests with pymerge's command: an environment of mergekit's."""
    binaries = environments.environment(environments.MERGEKIT)
    tools = environments.cache() / "environments" / "pytest"
    if not tools.exists():
        pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--target", tools, "pytest==9.0.1"]
        subprocess.run(pip, check=True)
    ours = str(Path(sys.executable).parent / "pymerge")
    return binaries / "python", {**os.environ, "PYTHONPATH": str(tools), "PYMERGE": ours, "HF_HUB_OFFLINE": "1"}


def engine() -> tuple[Path, dict[str, str]]:
    """Python and variables for the tests through mergekit's `run_merge`: mergekit beside this environment."""
    return Path(sys.executable), environments.variables_beside(environments.MERGEKIT_BESIDE)


def run_tests(unpacked: Path, form: Callable[[], tuple[Path, dict[str, str]]]) -> list[Row]:
    """A row for each test, merged by `command` or `engine`."""
    python, variables = form()
    # Not the package beside the tests: what is installed.
    work = unpacked / form.__name__
    (work / "tests").mkdir(parents=True)
    (work / "tests/__init__.py").touch()
    for name in FILES:
        shutil.copy(unpacked / "tests" / name, work / "tests" / name)
    shutil.copy(HERE / "mergekit_common.py", work / "tests" / "common.py")
    arguments = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junit-xml", "found.xml", "tests"]
    subprocess.run(arguments, cwd=work, env=variables, check=False)
    rows = []
    for case in ElementTree.parse(work / "found.xml").iter("testcase"):
        file = next(name for name in FILES if name.removesuffix(".py") in str(case.get("classname")).split("."))
        name = f"{file}::{case.get('name')}"
        failure = next((child for child in case if child.tag in ("failure", "error")), None)
        said = None if failure is None else str(failure.get("message"))[-400:]
        reason = next((why for pattern, why in DIFFERS.items() if re.search(pattern, name)), None)
        verdict = "passes" if said is None else "explained" if reason else "fails"
        rows.append(
            {"kind": "test", "form": form.__name__, "name": name, "verdict": verdict, "said": said, "reason": reason}
        )
    return rows


def whole(part: str) -> str:
    """A part of a config with what is missing: a linear merge of the models that it names."""
    named = sorted(set(re.findall(r"(?:source|model): \"?([\w./]+)", part)) - {"union"})
    models = ", ".join(f'{{model: "{name}"}}' for name in dict.fromkeys(["base", *named]))
    return f"merge_method: linear\nbase_model: base\nparameters: {{weight: 1.0}}\nmodels: [{models}]\n{part}"


def check_examples(unpacked: Path) -> list[Row]:
    """A row for each config of the README, or part of one."""
    rows = []
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", (unpacked / "README.md").read_text(), re.DOTALL)):
        said = None
        try:
            load_config(text if "merge_method:" in text else whole(text))
        except ConfigError as error:
            said = str(error)
        rows.append(
            {"kind": "config", "name": f"README {number}", "verdict": "fails" if said else "passes", "said": said}
        )
    return rows


def main(arguments: Sequence[str]) -> None:
    """Run the tests."""
    parser = commands.parser("benchmarks.parity.mergekit_tests", __doc__)
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = source(options.keep or Path(temporary))
        results = ResultsFile("parity-tests", mergekit=environments.MERGEKIT)
        results.rows += run_tests(unpacked, command) + run_tests(unpacked, engine) + check_examples(unpacked)
    results.write()
    for row in results.rows:
        if row["verdict"] != "passes":
            print(f"{row['verdict']}: {row.get('form', '')} {row['name']}: {row.get('reason') or row['said']}")
    bad = [row for row in results.rows if row["verdict"] == "fails"]
    print(f"{len(results.rows)} tests and configs, {len(bad)} fail; written to {results.path}")
    if bad:
        raise SystemExit(1)
