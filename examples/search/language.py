"""Search for the coefficients of a merge of language models, by tasks of the lm-evaluation-harness.

    python -m examples.search.language --out DIR --base B --experts E1 E2 --tasks arc_easy winogrande --limit 200
    python -m examples.search.language --out DIR --smoke

A Merger reads the models once; each trial overwrites the weights of one live model, which the harness evaluates as it
is: nothing is written or loaded between trials. CMA-ES proposes a coefficient for each expert. --smoke makes tiny
models and tasks of its own (letters.py), and needs no network. DIR/search.json has the trials and the best of them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

import pymerge
from examples.search import letters
from examples.search.samplers import SAMPLERS
from pymerge.testing.bench import machine

TRIALS, SMOKE_TRIALS = 60, 20
START, SPREAD = 0.3, 0.15


class Harness:
    """The models, prepared for many merges, and the live one that each merge overwrites and the harness evaluates."""

    def __init__(
        self,
        base: str | Path,
        experts: Sequence[str | Path],
        method: str,
        tasks: Sequence[str],
        metric: str,
        *,
        limit: int | None = None,
        include: str | None = None,
    ) -> None:
        self.tasks, self.metric, self.limit = list(tasks), metric, limit
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.merger = pymerge.Merger(base, list(experts), method)
        # The harness's own cache of answers must stay off: its keys know nothing of the weights.
        self.lm = HFLM(pretrained=self.model, tokenizer=AutoTokenizer.from_pretrained(base), batch_size=8)
        self.manager = TaskManager(include_path=include)

    def scores(self, weight: Sequence[float]) -> list[float]:
        """The metric of each task, of the merge with these coefficients."""
        self.merger.merge_into(self.model, weight=list(weight))
        found = lm_eval.simple_evaluate(
            model=self.lm,
            tasks=self.tasks,
            limit=self.limit,
            task_manager=self.manager,
            log_samples=False,
            bootstrap_iters=0,
        )
        return [float(found["results"][task][self.metric]) for task in self.tasks]


def search(harness: Harness, sampler: str, trials: int, seed: int) -> list[dict[str, Any]]:
    """Trials of CMA-ES, the first at its start: coefficients, scores and their mean."""
    asked = SAMPLERS[sampler]([START] * harness.merger.experts, SPREAD, seed)
    made = []
    for number in track(range(trials + 1), sampler, console=Console(stderr=True)):
        point = asked.ask() if number else [START] * harness.merger.experts
        scores = harness.scores(point)
        mean = sum(scores) / len(scores)
        if number:
            asked.tell(mean)
        made.append({"coefficients": point, "scores": scores, "mean": mean})
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for search.json")
    parser.add_argument("--smoke", action="store_true", help=f"tiny models made here, {SMOKE_TRIALS} trials")
    parser.add_argument("--base", help="folder or Hub name of what the experts were trained from")
    parser.add_argument("--experts", nargs="+", metavar="MODEL")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of the harness")
    parser.add_argument("--include", metavar="DIR", help="folder with tasks of one's own")
    parser.add_argument("--metric", default="acc,none", help="as the harness calls it; default acc,none")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task; default all")
    parser.add_argument("--method", default="task_arithmetic", help="one with a weight for each model")
    parser.add_argument("--sampler", choices=SAMPLERS, default="cma", help="who proposes: pycma or Optuna")
    parser.add_argument("--trials", type=int, metavar="N", help=f"default {TRIALS}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} exists; name a folder that doesn't")
    if not args.smoke and not (args.base and args.experts and args.tasks):
        parser.error("give --base, --experts and --tasks, or --smoke")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    with TemporaryDirectory() as folder:
        base, experts, tasks, include = args.base, args.experts, args.tasks, args.include
        if args.smoke:
            base, experts, tasks = letters.make(Path(folder))
            include = str(Path(folder, "tasks"))
        harness = Harness(base, experts, args.method, tasks, args.metric, limit=args.limit, include=include)
        trials = search(harness, args.sampler, args.trials or (SMOKE_TRIALS if args.smoke else TRIALS), args.seed)
    best = max(trials, key=lambda each: each["mean"])
    args.out.mkdir(parents=True)
    content = {"machine": machine(), "seed": args.seed, "tasks": tasks, "trials": trials, "best": best}
    (args.out / "search.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"mean {args.metric}: {trials[0]['mean']:.3f} at the start, {best['mean']:.3f} with {best['coefficients']}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
