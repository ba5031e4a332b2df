"""WEMoE on the glyph experts beside every static merge: accuracies, mixed batches, gates, and what bounds them.

    python -m benchmarks wemoe glyphs [--threads 1] [--steps 300]

Routers adapt on the validation images (80 or 100 a task) or, as published, on the test images without their labels.
Accuracies are those on the test images; `wemoe choose`, which sees none of them, chose the settings. Rows go to
benchmarks/runs/<machine>/<date>-wemoe-glyphs.json; `wemoe plot` draws the gates.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import pymerge
from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from examples.glyphs.demo import HERE, MERGES, TASKS, row
from examples.glyphs.model import cosine_logits, load_model
from pymerge import wemoe

BATCH = 16
MODULES = {"mlp": r"blocks\.\d+\.mlp", "mlp+attention": r"blocks\.\d+\.(mlp|attn)"}
# What is routed, the loss, and the images that the routers adapt on.
ADAPTATIONS = (
    ("mlp", "entropy", "test"),
    ("mlp", "distillation", "test"),
    ("mlp", "supervised", "validation"),
    ("mlp", "distillation", "validation"),
    ("mlp+attention", "distillation", "test"),
)
# Which tensors are each task's expert's own, all others being the static merge's: what gates could reach at most, as
# long as they choose among the experts.
PARTS = {"mlp": r"\.mlp\.", "mlp+attention": r"\.(mlp|attn)\.", "stem": "^stem", "stem+mlp": r"^stem|\.mlp\."}

Samples = tuple[Tensor, Tensor]  # images, labels


@dataclass(frozen=True)
class Setting:
    """How routers are made and adapted; what is not routed is the merge `static`."""

    modules: str = "mlp"
    static: str = "wudi_flow"
    depth: Literal[0, 1, 2] = 2
    init_lambda: float = 0.6
    lr: float = 1e-3
    steps: int = 300
    reduce: Literal["sample", "batch"] = "batch"


class Glyphs:
    """Base, experts, static merges, and the images."""

    def __init__(self) -> None:
        self.testset = load_file(HERE / "testset.safetensors")
        self.base = load_model(HERE / "base")
        self.experts = {task: load_model(HERE / "experts" / task) for task in TASKS}
        with tempfile.TemporaryDirectory(prefix="pymerge-glyphs-") as folder:
            for name in MERGES:
                pymerge.merge(HERE / "configs" / f"{name}.yml", Path(folder, name), progress=False)
            self.merges = {name: load_model(Path(folder, name)) for name in MERGES}

    def samples(self, task: str, part: str) -> Samples:
        """Images in [0, 1] and labels of a task."""
        return self.testset[f"{task}.{part}.images"].float() / 255, self.testset[f"{task}.{part}.labels"].long()

    def logits(self, task: str, features: Any) -> Tensor:
        """Through the frozen head of the task."""
        return cosine_logits(features, self.testset[f"{task}.mean"].float(), self.testset[f"{task}.head"].float())

    def routed(self, setting: Setting) -> wemoe.RoutedModel:
        """The upscaled model before adaptation."""
        states = {task: expert.state_dict() for task, expert in self.experts.items()}
        return wemoe.upscale(
            self.base,
            states,
            static=self.merges[setting.static].state_dict(),
            modules=MODULES[setting.modules],
            storage=wemoe.StorageSpec(dtype="float32"),
            router=wemoe.RouterSpec(depth=setting.depth),
            init_lambda=setting.init_lambda,
        )

    def mixture(self, pattern: str, static: str, task: str) -> nn.Module:
        """The static merge with the task's expert's tensors where `pattern` is found."""
        merged, own = self.merges[static].state_dict(), self.experts[task].state_dict()
        model = load_model(HERE / "base")
        model.load_state_dict({name: own[name] if re.search(pattern, name) else merged[name] for name in own})
        return model

    @torch.no_grad()
    def accuracies(self, model: nn.Module, data: Mapping[str, Samples], mixed: bool = False) -> list[float]:
        """Percent recognised of each task, in batches of one task or of all of them mixed."""
        images = torch.cat([data[task][0] for task in TASKS])
        order = torch.arange(len(images))
        if mixed:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            batches = list(order.split(BATCH))
        else:
            sizes = [len(data[task][0]) for task in TASKS]
            batches = [batch for part in order.split(sizes) for batch in part.split(BATCH)]
        features = torch.cat([model(images[batch]) for batch in batches])[order.argsort()]
        scores, start = [], 0
        for task in TASKS:
            labels = data[task][1]
            found = self.logits(task, features[start : start + len(labels)]).argmax(1)
            scores.append(100 * (found == labels).double().mean().item())
            start += len(labels)
        return scores


class Batches:
    """Images and labels in batches, in an order that PyTorch's generator draws anew on each pass."""

    def __init__(self, samples: Samples) -> None:
        self.images, self.labels = samples

    def __iter__(self) -> Iterator[Samples]:
        for places in torch.randperm(len(self.images)).split(BATCH):
            yield self.images[places], self.labels[places]


def adapted(
    glyphs: Glyphs, setting: Setting, loss: Any, data: Mapping[str, Samples]
) -> tuple[wemoe.RoutedModel, float]:
    """An adapted model, and the seconds that it took."""
    model = glyphs.routed(setting)
    begin = time.perf_counter()
    wemoe.adapt(
        model,
        {task: Batches(data[task]) for task in TASKS},
        steps=setting.steps,
        lr=setting.lr,
        loss=loss,
        logits=glyphs.logits,
        teachers=glyphs.experts if loss == "distillation" else None,
        reduce=setting.reduce,
        progress=False,
    )
    return model, time.perf_counter() - begin


def mean_gates(model: wemoe.RoutedModel, data: Mapping[str, Samples]) -> dict[str, dict[str, list[float]]]:
    """Mean gates of each task's samples: task -> module path -> one for each expert."""
    found: dict[str, dict[str, list[float]]] = {}
    with torch.no_grad():
        for task in TASKS:
            model(data[task][0])
            found[task] = {path: gates.mean(0).tolist() for path, gates in model.gates().items()}
    return found


def fixed_rows(glyphs: Glyphs, test: Mapping[str, Samples], static: str) -> list[dict[str, Any]]:
    """Individual experts, static merges, and what choosing among the experts could reach."""
    individual = [glyphs.accuracies(glyphs.experts[task], test)[number] for number, task in enumerate(TASKS)]
    rows: list[dict[str, Any]] = [{"kind": "individual", "name": "individual experts", **row(individual)}]
    for name in MERGES:
        rows.append({"kind": "static", "name": name, **row(glyphs.accuracies(glyphs.merges[name], test))})
    for name, pattern in PARTS.items():
        scores = [
            glyphs.accuracies(glyphs.mixture(pattern, static, task), test)[number] for number, task in enumerate(TASKS)
        ]
        rows.append({"kind": "choice", "name": f"each task's own {name}", **row(scores)})
    return rows


def routed_rows(
    glyphs: Glyphs, test: Mapping[str, Samples], setting: Setting, loss: str, part: str
) -> list[dict[str, Any]]:
    """One adaptation, measured with gates of each sample and with gates of the batch."""
    model, seconds = adapted(glyphs, setting, loss, {task: glyphs.samples(task, part) for task in TASKS})
    rows = []
    for reduce in ("batch", "sample"):
        model.reduce = "batch" if reduce == "batch" else "sample"
        single, mixed = (row(glyphs.accuracies(model, test, mix)) for mix in (False, True))
        rows.append(
            {
                "kind": "wemoe",
                "name": f"{loss} on {part} images",
                "modules": setting.modules,
                "reduce": reduce,
                **single,
                "mixed": mixed,
                "mixed_differs_by": max(abs(mixed[task] - single[task]) for task in TASKS),
                "seconds": seconds,
            }
        )
    return [{**rows[1], "gates": mean_gates(model, test)}, rows[0]]


def show(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table."""
    table = Table("model", "gates", *TASKS, "mean", "recovered", "mixed batches")
    for found in rows:
        name = found["name"] if found.get("modules", "mlp") == "mlp" else f"{found['name']}, {found['modules']}"
        scores = [f"{found[column]:.2f}" for column in (*TASKS, "mean")]
        recovered = f"{found['recovered']:.2f}" if "recovered" in found else ""
        mixed = f"{found['mixed']['mean']:.2f}" if "mixed" in found else ""
        table.add_row(name, found.get("reduce", ""), *scores, recovered, mixed)
    return table


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.wemoe.glyphs", __doc__)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    glyphs = Glyphs()
    test = {task: glyphs.samples(task, "test") for task in TASKS}
    results = ResultsFile("wemoe-glyphs", options={**vars(options), **asdict(Setting(steps=options.steps))})
    results.rows += fixed_rows(glyphs, test, Setting.static)
    best = max(found["mean"] for found in results.rows if found["kind"] == "static")
    for modules, loss, part in ADAPTATIONS:
        results.rows += routed_rows(glyphs, test, Setting(modules, steps=options.steps), loss, part)
        # The share of the distance from the best static merge to the individual experts.
        for found in results.rows:
            if found["kind"] in ("choice", "wemoe"):
                found["recovered"] = (found["mean"] - best) / (results.rows[0]["mean"] - best)
        results.write()
    Console(width=160).print(show(results.rows))
    print(f"written to {results.path}")
