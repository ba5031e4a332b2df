"""Python environments of their own for the peers, made once and kept outside the checkout.

They lie in $PYMERGE_BENCH_CACHE, or ~/.cache/pymerge-bench, one folder for each list of packages; removing a folder
makes the next run install it again. PyTorch comes first and stays pinned: a peer's own requirements cannot replace it.
Libraries that call pymerge run in its own environment instead, from folders of packages beside those that it has.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
FUSION_BENCH = ("fusion-bench==0.2.33",)
MERGEKIT = ("mergekit==0.1.5",)
PEFT = ("peft==0.21.2",)
# For `packages_beside`: with what they need and the environment of the tests does not have.
MERGEKIT_BESIDE = (*MERGEKIT, "immutables==0.21")
_DATASETS = (
    "datasets==5.2.0",
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "attrs==26.1.0",
    "dill==0.4.1",
    "frozenlist==1.8.0",
    "multidict==7.2.1",
    "multiprocess==0.70.19",
    "pandas==3.1.1",
    "propcache==0.5.4",
    "pyarrow==26.0.1",
    "python-dateutil==4.0.0",
    "tzdata==2026.6",
    "xxhash==4.1.0",
    "yarl==1.25.1",
)
FUSION_BENCH_BESIDE = (
    *FUSION_BENCH,
    *_DATASETS,
    "absl-py==2.5.1",
    "antlr4-python3-runtime==4.9.3",
    "bidict==0.24.1",
    "cloudpickle==3.1.3",
    "contourpy==1.3.3",
    "cycler==0.12.1",
    "fonttools==4.68.0",
    "grpcio==1.85.3",
    "h5py==3.16.0",
    "hydra-core==1.3.8",
    "joblib==1.6.0",
    "kiwisolver==1.5.1",
    "lightning==2.6.6",
    "lightning-utilities==0.15.3",
    "Markdown==3.11.3",
    "matplotlib==3.11.2",
    "omegaconf==2.3.1",
    "pillow==13.0.0",
    "protobuf==7.36.2",
    "pyparsing==3.3.3",
    "pytorch-lightning==2.6.6",
    "scipy==1.17.1",
    "tensorboard==2.21.0",
    "tensorboard-data-server==0.7.2",
    "torchmetrics==1.9.0",
    "Werkzeug==3.1.9",
)
LM_EVAL_BESIDE = (
    "lm_eval==0.4.13",
    *_DATASETS,
    "absl-py==2.5.1",
    "chardet==6.0.0.post1",
    "colorama==0.4.6",
    "DataProperty==0.37.0",
    "defusedxml==0.7.1",
    "dominate==2.9.1",
    "evaluate==0.4.6",
    "joblib==1.6.0",
    "Logbook==1.10.1",
    "lxml==6.1.3",
    "mbstrdecoder==1.1.5",
    "more-itertools==11.2.1",
    "msgfy==0.2.1",
    "narwhals==2.29.0",
    "nltk==3.10.4",
    "pathvalidate==3.3.1",
    "portalocker==4.4.2",
    "pytablewriter==0.38.0",
    "rouge_score==0.1.2",
    "sacrebleu==2.6.0",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "six==1.17.0",
    "sqlitedict==2.1.0",
    "tabledata==0.0.26",
    "tabulate==0.10.0",
    "threadpoolctl==3.8.0",
    "typepy==0.3.1",
    "word2number==1.1",
)
RAY_BESIDE = (
    "ray==2.60.0",
    "attrs==26.1.0",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "msgpack==1.2.4",
    "protobuf==7.36.2",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
)
SENTENCE_TRANSFORMERS_BESIDE = (
    "sentence-transformers==6.2.0",
    "scikit-learn==1.9.1",
    "joblib==1.6.0",
    "threadpoolctl==3.8.0",
    "narwhals==2.29.0",
    "cloudpickle==3.1.3",
)


def cache() -> Path:
    """The folder that environments and made checkpoints share."""
    return Path(os.environ.get("PYMERGE_BENCH_CACHE") or Path.home() / ".cache" / "pymerge-bench").expanduser()


def environment(packages: Sequence[str], *, checkout: bool = False) -> Path:
    """The bin folder of an environment with PyTorch, these packages and, if asked, this checkout (editable).

    It is made if it is not there: minutes, and a gigabyte. An installation that was broken off starts again.
    """
    what = [sys.version.split()[0], TORCH, *packages, *([str(ROOT)] if checkout else [])]
    key = hashlib.sha256("\n".join(what).encode()).hexdigest()[:8]
    folder = cache() / "environments" / f"{packages[0].replace('==', '-')}-{key}"
    done = folder / "installed.txt"
    if not done.exists():
        print(f"installing {', '.join(packages)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        _pip(folder, TORCH)
        _pip(folder, TORCH, *packages)
        if checkout:
            # The compiled parts are built as in any other environment, without a GPU's: these runs are the CPU's.
            _pip(folder, "setuptools>=77,<90", "wheel>=0.43,<1", "pybind11>=2.13,<4")
            _pip(folder, TORCH, "--no-build-isolation", "--editable", str(ROOT), build_cuda=False)
        frozen = subprocess.run([folder / "bin/python", "-m", "pip", "freeze"], capture_output=True, check=True)
        done.write_bytes(frozen.stdout)
    return folder / "bin"


def packages_beside(packages: Sequence[str]) -> Path:
    """A folder for PYTHONPATH with exactly these packages, for this interpreter, beside what it has installed.

    It is made in seconds if it is not there. The folder does not depend on the checkout: nothing is built, and what
    the packages require is not looked at.
    """
    key = hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest()[:8]
    folder = cache() / "beside" / f"{packages[0].replace('==', '-')}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making it
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--target", str(unfinished), *packages], check=True)
            unfinished.rename(folder)
    return folder


def variables_beside(*lists: Sequence[str]) -> dict[str, str]:
    """This process's environment variables for a child that has these lists of packages, and this checkout."""
    path = [*(str(packages_beside(packages)) for packages in lists), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}


def _pip(folder: Path, *arguments: str, build_cuda: bool = True) -> None:
    variables = os.environ if build_cuda else {**os.environ, "PYMERGE_CUDA": "0"}
    command = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, env=variables, check=True)


def versions(binaries: Path) -> list[str]:
    """What is installed in an environment that `environment` made, as `pip freeze` lists it."""
    return (binaries.parent / "installed.txt").read_text().splitlines()
