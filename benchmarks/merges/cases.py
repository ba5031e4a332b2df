"""The merges that are timed: each method's config, and the models and files that it reads."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import synthetic
from pymerge.methods import METHODS

# Of a merge's config, beside models and dtype; and whether mergekit has the method, too.
CONFIGS: dict[str, tuple[str, bool]] = {
    "linear": ("", True),
    "task_arithmetic": ("parameters: {lambda: 0.4}\n", True),
    "slerp": ("parameters: {t: 0.4}\n", True),
    "ties": ("parameters: {lambda: 1.0, density: 0.5}\n", True),
    "dare_ties": ("parameters: {lambda: 1.0, density: 0.5}\n", True),
    "della": ("parameters: {lambda: 1.0, density: 0.5, epsilon: 0.15}\n", True),
    "sce": ("parameters: {select_topk: 0.3}\n", True),
    "arcee_fusion": ("", True),
    "ace": ("", False),
    "wudi_flow": ("", False),
    "weir": ("", False),
    "wudi": ("", False),
    "tsv_m": ("", False),
    "iso_c": ("", False),
}


def config(method: str, models: Path) -> str:
    """The YAML that both tools read."""
    base = "" if method == "linear" else f"base_model: {models / 'base'}\n"
    listed = "".join(f"  - model: {models / name}\n    parameters: {{weight: 1.0}}\n" for name in experts(method))
    if method not in METHODS or "weight" not in {parameter.name for parameter in METHODS[method].parameters}:
        listed = listed.replace("    parameters: {weight: 1.0}\n", "")
    return f"merge_method: {method}\n{base}models:\n{listed}{CONFIGS[method][0]}dtype: bfloat16\n"


def experts(method: str) -> tuple[str, ...]:
    """The models that a method merges, beside a base."""
    most = METHODS[method].most_experts if method in METHODS else None
    return synthetic.MODELS[1:] if most is None else synthetic.MODELS[1 : 1 + most]


def inputs(method: str, models: Path) -> list[Path]:
    """The weight files that a method reads."""
    used = experts(method) if method == "linear" else (synthetic.MODELS[0], *experts(method))
    return [file for name in used for file in sorted((models / name).glob("*.safetensors"))]
