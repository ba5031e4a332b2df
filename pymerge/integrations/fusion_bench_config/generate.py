"""Content of the configs: each method with all its parameters at their defaults."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pymerge.methods import METHODS
from pymerge.methods.base import Method, Parameter

FOLDER = Path(__file__).parent / "method" / "pymerge"
TARGET = "pymerge.integrations.fusion_bench.Merge"
_WEIGHT = "weight"
_GENERATED = "Written by python -m pymerge.integrations.fusion_bench_config."
_WIDTH = 110
_END = "...\n"  # of a document that is a plain value
# Keys of all methods, with what they mean.
_KEYS: Mapping[str, tuple[Any, str]] = {
    "stream": (
        "auto",
        "merge from files into out_dir, in bounded memory: true, false, or auto, where the pool has models in files",
    ),
    "out_dir": (None, "of a streamed merge; default: merged in the folder of Hydra's run"),
    "memory": (
        None,
        'limit for what is held at once, such as "8GiB"; default: three quarters of what is available. A merge in '
        "memory holds all models, and is refused where they are more",
    ),
    "device": ("auto", "where to compute: auto, cpu, cuda or cuda:N"),
    "evaluate": (True, "load a streamed merge, so that it is evaluated and saved; false: leave it in out_dir"),
}


def configs() -> dict[str, str]:
    """The text of each config, by the name of its file."""
    return {
        f"{name}.yaml": "\n".join(_lines(METHODS[name])) + "\n" for name in METHODS if not METHODS[name].needs_inputs
    }


def _lines(method: Method) -> Iterator[str]:
    yield f"# {_GENERATED}"
    yield from _comment(f"{method.summary} ({method.source})")
    yield f"_target_: {TARGET}"
    yield f"merge_method: {method.name}"
    own = [each for each in method.all_parameters if _stands(each)]
    yield "parameters:" if own else "parameters: {}"
    for each in own:
        yield from _comment(_meaning(each), "  ")
        yield f"  {_entry(each.name, each.default)}"
    weight = next((each for each in method.parameters if each.name == _WEIGHT), None)
    if weight is not None:
        yield from _comment(f"{weight.summary}: one number, a list in the pool's order, or by the models' names")
        yield _entry("weights", weight.default)
    for key, (value, meaning) in _KEYS.items():
        yield from _comment(meaning)
        yield _entry(key, value)


def _stands(parameter: Parameter) -> bool:
    """Whether a parameter stands under `parameters` with its default."""
    return not parameter.no_effect and parameter.only_with is None and parameter.name != _WEIGHT


def _meaning(parameter: Parameter) -> str:
    choices = f"; one of {', '.join(parameter.choices)}" if parameter.choices else ""
    each = "; a number, a list in the pool's order, or by the models' names" if parameter.scope == "model" else ""
    return f"{parameter.summary}{choices}{each}"


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _entry(key: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return f"{key}: {yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix(_END).strip()}"
