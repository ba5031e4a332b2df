"""Builds pymerge._C (C++) and, where nvcc is found, pymerge._cuda (CUDA C++). Needs neither torch nor a GPU.

PYMERGE_CUDA=auto|0|1, PYMERGE_CUDA_ARCHS="80;90", PYMERGE_OPENMP=auto|0 and PYMERGE_NATIVE=0 (neither) choose what is
built; the rest is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# Contraction is off so that every instruction set gives the same bits. -fno-math-errno and -fno-trapping-math
# drop only errno and traps, which nothing here reads: loops with square roots and selects vectorise then.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra"]
INCLUDES = ["csrc", pybind11.get_include()]
# Packages that lie elsewhere. hydra_plugins belongs to all who have plugins for Hydra: it has no __init__.py.
PLACED = {
    "pymerge.kernels": "kernels",
    "hydra_plugins.pymerge_config": "pymerge/integrations/hydra/hydra_plugins/pymerge_config",
}
# Hydra's configs, in folders that are no packages.
CONFIGS = "pymerge.integrations.fusion_bench_config.method.pymerge"
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


def find_nvcc() -> str | None:
    """The nvcc to build with, or None; an error if PYMERGE_CUDA=1 and there is none."""
    wanted = os.environ.get("PYMERGE_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"PYMERGE_CUDA is {wanted!r}; set it to auto, 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which(str(Path(home, "bin", "nvcc")))
    if nvcc is None and wanted == "1":
        sys.exit(f"PYMERGE_CUDA=1, but nvcc is neither on PATH nor in {home}/bin; install the CUDA toolkit")
    return nvcc


def cuda_architectures() -> list[str]:
    """PYMERGE_CUDA_ARCHS as a list, oldest first."""
    value = os.environ.get("PYMERGE_CUDA_ARCHS") or "80;90"
    archs = sorted({part.strip() for part in value.split(";")}, key=lambda arch: int(arch) if arch.isdigit() else -1)
    if not all(arch.isdigit() for arch in archs):
        sys.exit(f"PYMERGE_CUDA_ARCHS is {value!r}; give compute capabilities such as 80;90")
    return archs


class BuildExtensions(build_ext):
    """Compiles source files side by side, and hands pymerge._cuda to nvcc as a whole."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "pymerge._cuda":
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def jobs(self) -> ThreadPoolExecutor:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return ThreadPoolExecutor(max_workers=max(1, min(count, 8)))

    def has_openmp(self) -> bool:
        """True if OpenMP is wanted, and the compiler builds and links a program with it."""
        wanted = os.environ.get("PYMERGE_OPENMP", "auto")
        if wanted not in ("auto", "0"):
            sys.exit(f"PYMERGE_OPENMP is {wanted!r}; set it to auto or 0")
        if wanted == "0":
            return False
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=["-fopenmp"])
            except (CompileError, LinkError) as error:
                print(f"pymerge: no OpenMP, the C++ ops will start threads of their own ({error})")
                return False
        return True

    def build_cpu(self, ext: Extension) -> None:
        threads = ["-fopenmp" if self.has_openmp() else "-pthread"]
        ext.extra_compile_args = [*CXX_FLAGS, *threads]
        ext.extra_link_args = threads
        compile_files = self.compiler.compile

        def compile_side_by_side(sources: list[str], **options: object) -> list[str]:
            with self.jobs() as pool:
                compiled = pool.map(lambda source: compile_files([source], **options), sources)
                return [target for targets in compiled for target in targets]

        self.compiler.compile = compile_side_by_side
        super().build_extension(ext)
        self.compiler.compile = compile_files

    def build_cuda(self, ext: Extension) -> None:
        archs = cuda_architectures()
        host = [f"-Xcompiler={flag}" for flag in ["-fPIC", *CXX_FLAGS[2:]]]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        common = [self.nvcc, "-std=c++20", "-O3", "--fmad=false", *host, *codes]
        folders = [f"-I{folder}" for folder in [*INCLUDES, *self.include_dirs]]
        defines = [f'-DPM_CUDA_ARCHS="{" ".join(archs)}"']
        os.makedirs(self.build_temp, exist_ok=True)

        def compile_file(source: str) -> str:
            target = os.path.join(self.build_temp, Path(source).stem + ".o")
            self.spawn([*common, *folders, *defines, "-c", source, "-o", target])
            return target

        with self.jobs() as pool:
            objects = list(pool.map(compile_file, ext.sources))
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.spawn([*common, "-shared", "--cudart=static", *objects, "-o", target])

    @property
    def nvcc(self) -> str:
        return find_nvcc() or "nvcc"


def extensions() -> list[Extension]:
    native = os.environ.get("PYMERGE_NATIVE", "1")
    if native not in ("0", "1"):
        sys.exit(f"PYMERGE_NATIVE is {native!r}; set it to 0 or 1")
    if native == "0":
        return []
    bindings = sorted(set(glob("csrc/bindings/*.cpp")) - {"csrc/bindings/cuda.cpp"})
    cpu = [*bindings, *sorted(glob("csrc/*/*_cpu.cpp"))]
    found = [Extension("pymerge._C", cpu, include_dirs=INCLUDES, depends=HEADERS, language="c++")]
    if find_nvcc():
        cuda = ["csrc/bindings/cuda.cpp", *sorted(glob("csrc/ops/*_cuda.cu"))]
        found.append(Extension("pymerge._cuda", cuda, include_dirs=INCLUDES, depends=HEADERS, language="c++"))
    return found


setup(
    packages=[*find_packages(include=["pymerge", "pymerge.*"]), *PLACED, CONFIGS],
    package_dir=PLACED,
    package_data={
        "pymerge": ["py.typed", "*.pyi"],
        "pymerge.backends": ["*.json"],
        "pymerge.analysis": ["*.html"],
        CONFIGS: ["*.yaml"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
