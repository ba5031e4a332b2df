"""The commands of `python -m benchmarks`, and the parser of each one's options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """A module with a `main(arguments)`, and what it does in a line."""

    module: str
    summary: str


# Suite -> name of a command -> command. The one without a name is what the suite's name alone runs.
SUITES: Mapping[str, Mapping[str, Command]] = {
    "ops": {
        "": Command("benchmarks.ops.run", "every op on every backend that runs here, beside its published form"),
        "plot": Command("benchmarks.ops.plot", "draw what was measured, under the machine's two limits"),
        "record": Command("benchmarks.ops.record", "take a GPU's results into the table that auto chooses by"),
        "bandwidth": Command("benchmarks.ops.bandwidth", "combine beside plain copies of as many bytes"),
    },
    "solvers": {
        "": Command("benchmarks.solvers.run", "whole solvers on one layer, beside published WUDI, SWUDI and ACE"),
        "accuracy": Command("benchmarks.solvers.accuracy", "relative errors against float64 forms"),
    },
    "merges": {
        "": Command("benchmarks.merges.run", "whole merges, beside mergekit and a floor that only reads and writes"),
    },
    "integrations": {
        "": Command("benchmarks.integrations.run", "mergekit's run_merge in one process, as it is and by pymerge"),
    },
    "adapters": {
        "": Command("benchmarks.adapters.run", "merges of adapters, beside whole weights and mergekit"),
    },
    "merger": {
        "": Command("benchmarks.merger.run", "later merges of the same models in memory, beside the first and PyTorch"),
    },
    "parts": {
        "": Command("benchmarks.parts.run", "merges file by file and by two processes, beside one merge"),
    },
    "device": {
        "": Command("benchmarks.device.run", "tests and figures on a machine with a GPU, in 8 minutes: make gpu"),
        "bundle": Command("benchmarks.device.bundle", "wheels for such a machine, which needs no network then"),
        "take": Command("benchmarks.device.take", "take what a run has brought home into results and measured.json"),
    },
    "wemoe": {
        "": Command("benchmarks.wemoe.run", "one routed MLP, beside FusionBench's module and the base MLP"),
        "build": Command("benchmarks.wemoe.build", "builds of WEMoE directories, beside the disk"),
        "decode": Command("benchmarks.wemoe.decode", "tokens per second, beside the plain base model"),
        "glyphs": Command("benchmarks.wemoe.glyphs", "accuracies on the glyph experts, and their gates"),
        "choose": Command("benchmarks.wemoe.choose", "the settings of `glyphs`, on validation images"),
        "plot": Command("benchmarks.wemoe.plot", "draw the gates that `glyphs` found"),
    },
    "parity": {
        "": Command("benchmarks.parity.run", "small models by every method of mergekit, with both, tensor by tensor"),
        "tests": Command("benchmarks.parity.mergekit_tests", "mergekit's own tests of whole merges, with pymerge"),
    },
    "quality": {
        "": Command("benchmarks.quality.run", "what each merge is worth on a suite of tasks"),
        "train": Command("benchmarks.quality.train", "make the suites glyphs8 and glyphs16"),
        "language": Command("benchmarks.quality.language_train", "make the suite minilm4"),
        "causal": Command("benchmarks.quality.causal_train", "make the suite smollm4"),
        "show": Command("benchmarks.quality.show", "tables of what was measured"),
        "plot": Command("benchmarks.quality.plot", "draw what was measured"),
        "explore": Command("benchmarks.quality.explore", "formulas that no method has, on validation examples"),
        "smoke": Command("benchmarks.quality.smoke", "two of the example's experts, in seconds"),
    },
    "tables": {
        "": Command("benchmarks.tables.run", "write the numbers and generated tables of README.md and the docs"),
        "take": Command("benchmarks.tables.take", "take a run into benchmarks/results, to be quoted"),
    },
}


def overview() -> str:
    """All commands, a line each."""
    lines = ["usage: python -m benchmarks SUITE [COMMAND] [OPTIONS]    (--help of each lists its options)", ""]
    for suite, commands in SUITES.items():
        lines += [f"  {f'{suite} {name}':18}{command.summary}" for name, command in commands.items()]
    return "\n".join(lines)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a module's options, called as the command is, with the other commands of its suite at the end."""
    suite, name = next(
        (suite, name) for suite, commands in SUITES.items() for name in commands if commands[name].module == module
    )
    others = [f"  {suite} {other:12}{command.summary}" for other, command in SUITES[suite].items() if other != name]
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {suite} {name}".rstrip(),
        description=description,
        epilog="\n".join(["also:", *others]) if others else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
