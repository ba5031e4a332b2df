"""A merge that is made in parts, by commands in processes of their own, and what one merge writes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pymerge import api
from pymerge.planner.parts import assign
from tests.helpers.checkpoints import (
    CARRIED,
    Done,
    Running,
    llama,
    llama_config,
    pymerge,
    start,
    tree,
    write_config,
    write_model,
    write_models,
)

SIZE = ("--max-shard-size", "4KB")


@dataclass(frozen=True)
class Scene:
    """A config, the arguments of its merge, and what one merge writes."""

    config: Path
    more: tuple[str, ...]
    expected: dict[str, bytes]

    def merge(self, out: Path, *more: str) -> Done:
        return pymerge("merge", self.config, out, *self.more, *more)

    def start(self, out: Path, *more: str) -> Running:
        return start("merge", self.config, out, *self.more, *more)

    def finalize(self, out: Path, *more: str) -> Done:
        return pymerge("finalize", self.config, out, *self.more, *more)

    def files(self, count: int) -> list[list[str]]:
        return assign(api.plan(self.config, max_shard_size=self.more[1]), count)


def make_scenes(folder: Path) -> dict[str, Scene]:
    """wudi, linear, and a ties whose tensors decide together; of a model with files that are carried over."""
    base = llama()
    write_models(folder, base, config=llama_config(base))
    write_model(folder / "base", base, config=llama_config(base), files=CARRIED)
    parameters: dict[str, dict[str, object]] = {"wudi": {"iterations": 30}, "linear": {}}
    parameters["ties"] = {"weight": 1.0, "density": 0.5, "scope": "model"}
    found = {}
    for method, values in parameters.items():
        config = write_config(folder, method, **values).rename(folder / f"{method}.yml")
        done = pymerge("merge", config, folder / method, *SIZE)
        assert done.code == 0, done
        found[method] = Scene(config, SIZE, tree(folder / method))
    return found


def check_not_yet(out: Path) -> None:
    """Nothing that is there can be taken for a model."""
    assert os.listdir(out) == [".pymerge"]
    done = pymerge("verify", out)
    assert done.code == 8
    assert re.search("is an unfinished merge; run its parts, of [0-9]+, then pymerge finalize", done.errors[0])
