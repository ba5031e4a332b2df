"""Times decoding with a Llama WEMoE, whose gates are those of the prompt, against the plain base model.

    python -m benchmarks wemoe decode [--sizes tiny 135M] [--tokens 32] [--threads 2]

Greedy generate() with a key-value cache, batch 1, float32; all storages and the plain model take turns in one process.
The prompt alone is timed, too: what decoding takes is the difference. First the tokens are compared with those of the
static model that merge_for makes for the prompt. Rows go to benchmarks/runs/<machine>/<date>-wemoe-decode.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.harness import commands, environments, synthetic
from benchmarks.harness.results import ResultsFile
from pymerge import wemoe
from pymerge.testing.bench import summary, time_in_turns

RANK = 32
STORAGES = {
    "dense float32": wemoe.StorageSpec(dtype="float32"),
    "dense": wemoe.StorageSpec(),
    "pruned 0.9": wemoe.StorageSpec(kind="pruned", ratio=0.9),
    f"low rank {RANK}": wemoe.StorageSpec(kind="low_rank", rank=RANK),
}
PROMPT = 16


def models(size: str, storages: list[str]) -> dict[str, Any]:
    """The plain base, and a WEMoE of the three experts for each storage."""
    folder = synthetic.make(size, environments.cache())
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    experts = {
        name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).state_dict()
        for name in synthetic.MODELS[1:]
    }
    routed = {name: wemoe.upscale(base, experts, storage=STORAGES[name]) for name in storages}
    return {"plain": base, **routed}


@torch.no_grad()
def generate(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """So many new tokens, whatever they are."""
    found: Tensor = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return found[:, prompt.shape[1] :]


def compare(size: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check and time one size; a row for each storage."""
    found = models(size, options.storages)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, found["plain"].config.vocab_size, (1, PROMPT), generator=generator)
    agreed = {}
    for name in options.storages:
        static = found[name].merge_for(input_ids=prompt)
        expected = generate(static, prompt, options.tokens)
        agreed[name] = int((generate(found[name], prompt, options.tokens) == expected).cumprod(1).sum())
        del static
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in found.items():
        calls[f"{name}, prompt"] = partial(generate, model, prompt, 1)
        calls[f"{name}, all"] = partial(generate, model, prompt, options.tokens)
    times = {name: summary(taken) for name, taken in time_in_turns(calls, seconds=options.seconds).items()}
    rates = {name: options.tokens / times[f"{name}, all"]["median"] for name in found}
    rows = []
    for name in found:
        whole, start = times[f"{name}, all"], times[f"{name}, prompt"]
        rows.append(
            {
                "kind": "decode",
                "size": size,
                "model": name,
                "seconds": whole,
                "prompt_seconds": start,
                "tokens_per_second": rates[name],
                "share_of_plain": rates[name] / rates["plain"],
                "decoding_share_of_plain": (times["plain, all"]["median"] - times["plain, prompt"]["median"])
                / (whole["median"] - start["median"]),
                "tokens_as_static": agreed.get(name),
            }
        )
    return rows


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.wemoe.decode", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "135M"), default=["tiny", "135M"])
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each size")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = ResultsFile("wemoe-decode", options={key: str(value) for key, value in vars(options).items()})
    table = Table("model", "storage", "tokens/s", "prompt", "of plain", "of plain, decoding alone", "tokens as static")
    for size in options.sizes:
        for found in compare(size, options):
            results.rows.append(found)
            cells = [f"{found['tokens_per_second']:.1f}", f"{found['prompt_seconds']['median']:.3g} s"]
            cells += [f"{found[key]:.2f}" for key in ("share_of_plain", "decoding_share_of_plain")]
            agreed = "" if found["tokens_as_static"] is None else str(found["tokens_as_static"])
            table.add_row(size, found["model"], *cells, agreed)
        results.write()
    Console(width=120).print(table)
    print(f"written to {results.path}")
