"""`pymerge mergekit-yaml` and `pymerge mergekit-multi`: mergekit's command lines, carried out without mergekit."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pymerge.cli.console import print_report
from pymerge.common.events import recording
from pymerge.engine.report import MergeReport
from pymerge.integrations.mergekit.merges import merge_file, merge_stages
from pymerge.integrations.mergekit.options import Options

# What each option does here. All of mergekit's are taken, with its defaults.
HELP: Mapping[str, str] = {
    "allow_crimes": "no effect: tensors are matched by name and shape",
    "unsafe_truncate_embeddings": "merge the rows of token tables that all models have, and keep the base's others",
    "transformers_cache": "folder in which models of the Hugging Face Hub are kept",
    "lora_merge_cache": "not needed: adapters are applied as they are read",
    "lora_merge_dtype": "no effect: adapters are applied in float32",
    "cuda": "compute on the GPU",
    "device": "compute on this device: cpu, cuda, cuda:N or auto",
    "low_cpu_memory": "not needed: tensors are streamed",
    "out_shard_size": "bytes above which a new output file is started: 5B, 500M",
    "copy_tokenizer": "copy the tokenizer's files to the output",
    "clone_tensors": "not needed: every tensor of the output is written by itself",
    "trust_remote_code": "no effect: no code of a model is run",
    "random_seed": "seed of methods that draw random numbers",
    "lazy_unpickle": "not needed: .bin files are read by position, and nothing in them is run",
    "write_model_card": "write README.md and mergekit_config.yml",
    "safe_serialization": "always safetensors; --no-safe-serialization is refused",
    "verbosity": "say what is computed where; repeating it changes nothing",
    "quiet": "print errors only",
    "read_to_gpu": "not needed: tensors are streamed",
    "multi_gpu": "no effect: one device computes a merge",
    "num_threads": "threads of the CPU",
    "gpu_rich": "as --cuda",
    "async_write": "always: reading, computing and writing overlap",
    "write_threads": "not needed: writing overlaps with computing",
}
_SIZES = {"k": 10**3, "m": 10**6, "b": 10**9}


def yaml_command(arguments: Sequence[str]) -> None:
    """Merge one config."""
    parser = _parser("mergekit-yaml", "CONFIG_FILE OUT_PATH", "Merge the models of a config, as mergekit-yaml does.")
    parser.add_argument("out_path", metavar="OUT_PATH", help="folder of the merged model")
    parsed = parser.parse_args(arguments)
    options = _options(parsed)
    with recording(None, verbose=options.verbosity > 0):
        _show(options, [merge_file(parsed.config_file, parsed.out_path, options)])


def multi_command(arguments: Sequence[str]) -> None:
    """Run several merges that build on each other."""
    parser = _parser("mergekit-multi", "CONFIG_FILE", "Run merges that build on each other, as mergekit-multi does.")
    parser.add_argument("--out-path", metavar="PATH", help="folder of the config without a name")
    parser.add_argument("--intermediate-dir", "-I", metavar="PATH", required=True, help="folder of the others")
    lazy = "verify finished merges and keep them; --no-lazy merges again"
    parser.add_argument("--lazy", action=argparse.BooleanOptionalAction, default=True, help=lazy)
    parsed = parser.parse_args(arguments)
    options = _options(parsed)
    with recording(None, verbose=options.verbosity > 0):
        folders = parsed.out_path, parsed.intermediate_dir
        _show(options, merge_stages(parsed.config_file, *folders, options, lazy=parsed.lazy))


def _parser(command: str, arguments: str, description: str) -> argparse.ArgumentParser:
    """A parser of a config file and of all options of a merge."""
    name = f"pymerge {command}"
    usage = f"{name} {arguments} [OPTIONS]"
    parser = argparse.ArgumentParser(name, usage, description, allow_abbrev=False)
    parser.add_argument("config_file", type=Path, metavar="CONFIG_FILE", help="YAML file")
    group = parser.add_argument_group("options of a merge, by mergekit's names")
    kinds: dict[str, dict[str, Any]] = {
        "verbosity": {"action": "count"},
        "gpu_rich": {"action": "store_true"},
        "out_shard_size": {"type": _size, "metavar": "SIZE"},
        **{name: {"type": int, "metavar": "N"} for name in ("random_seed", "num_threads", "write_threads")},
    }
    for field in fields(Options):
        flags = {"verbosity": ["-v"], "num_threads": ["-j", "--num-threads"]}.get(field.name)
        switch = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {"metavar": "TEXT"}
        group.add_argument(
            *(flags or ["--" + field.name.replace("_", "-")]),
            dest=field.name,
            default=field.default,
            help=HELP[field.name],
            **kinds.get(field.name, switch),
        )
    return parser


def _options(parsed: argparse.Namespace) -> Options:
    return Options(**{field.name: getattr(parsed, field.name) for field in fields(Options)})


def _size(text: str) -> int:
    """A number of bytes as mergekit writes it: 5B, 500M, 20k, 1000."""
    number, factor = (text[:-1], _SIZES[text[-1].lower()]) if text[-1:].lower() in _SIZES else (text, 1)
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"size {text!r} is not understood; write for example 5B or 500M")
    return int(number) * factor


def _show(options: Options, reports: Sequence[MergeReport]) -> None:
    for report in reports:
        print_report(report, quiet=options.quiet, verbose=bool(options.verbosity))
