"""WEMoE's speed, memory and accuracy: docs/wemoe.md."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness.results import Content
from benchmarks.tables.glyphs import TASKS
from benchmarks.tables.page import Block, Part, Said, table
from benchmarks.tables.quoted import row, rows

PAGE = "docs/wemoe.md"
MERGES = {
    "average": "simple average",
    "task_arithmetic": "task arithmetic, 0.4",
    "wudi": "wudi",
    "wudi_auto": "wudi, `lr: auto`",
    "wudi_flow": "wudi_flow",
    "ace": "ace",
}
OWN = {"mlp": "MLPs", "mlp+attention": "MLPs and attention", "stem": "stem", "stem+mlp": "stem and MLPs"}
STORED = {
    "dense float32": "dense, stored in float32",
    "dense": "dense, stored in bfloat16",
    "pruned 0.9": "pruned 0.9",
    "low rank 32": "low rank 32",
}
GATES = {"sample": "each sample", "batch": "the batch"}


def parts() -> Iterator[Part]:
    """What is quoted of it."""
    yield from speed()
    yield from building()
    lines = []
    for name, said in STORED.items():
        sizes = [row("wemoe-decode", size=size, model=name) for size in ("tiny", "135M")]
        lines.append([said, *(f"{found['decoding_share_of_plain']:.2f}" for found in sizes)])
    yield Block(PAGE, "wemoe-decode", table(["", "tiny Llama", "135 M Llama"], lines))
    yield Block(PAGE, "wemoe-glyphs", accuracies())
    routed = {"modules": "mlp", "reduce": "batch"}
    for loss in ("entropy", "distillation"):
        found = row("wemoe-glyphs", name=f"{loss} on test images", **routed)
        numbers = [f"{found['mean']:.2f}", f"{found['mixed']['mean']:.2f}"]
        words = f"{{}} on batches of one task fall to {{}} on mixed ones ({loss} on test images)"
        yield Said(PAGE, words, numbers)
    apart = max(each["mixed_differs_by"] for each in rows("wemoe-glyphs", kind="wemoe", reduce="sample"))
    yield Said(PAGE, "(largest difference: {})", [f"{apart:.2f}"])


def speed() -> Iterator[Part]:
    """One routed MLP."""
    lines = []
    for found in rows("wemoe", kind="forward"):
        case = {"samples": found["samples"], "tasks": found["tasks"]}
        memory = row("wemoe", kind="memory", **case)["over_base_mib"]
        cell = f"{memory[found['storage']]:.0f} MiB"
        if found["storage"] == "float32":
            cell += f", {memory['fusion_bench']:.0f} MiB"
        name = f"{case['samples']}, {case['tasks']}"
        lines.append([name, found["storage"], f"{found['speedup']:.2f}x", f"{found['over_base']:.2f}", cell])
    memories = "memory beyond the base MLP's, and FusionBench's"
    head = ["samples, T", "task vectors", "against FusionBench", "time over the base MLP's", memories]
    yield Block(PAGE, "wemoe-mlp", table(head, lines))
    short = rows("wemoe", "short", kind="forward", samples=16)
    numbers = [*ends(short, "speedup"), *ends(short, "over_base")]
    yield Said(PAGE, "has {}x to {}x and {} to {} for 16 samples", numbers)
    both = rows("wemoe", kind="forward and backward", samples=16, tasks=8)
    shares = sorted(1 / found["speedup"] for found in both)
    yield Said(PAGE, "experts take {} to {} of FusionBench's time", [f"{shares[0]:.2f}", f"{shares[-1]:.2f}"])
    theirs = both[0]["peer_seconds"]
    pruned = next(found for found in both if "pruned" in found["storage"])
    yield Said(PAGE, "(whose runs of that are {} s to {} s apart)", [f"{theirs['min']:.1f}", f"{theirs['median']:.0f}"])
    dense = [found for found in both if found is not pruned]
    yield Said(PAGE, "and {} to {} times the base MLP's, which has", ends(dense, "over_base"))
    yield Said(PAGE, "; {} times for pruned task vectors", [f"{pruned['over_base']:.1f}"])


def ends(found: list[Content], column: str) -> list[str]:
    """The least and the largest value."""
    values = [each[column] for each in found]
    return [f"{min(values):.1f}", f"{max(values):.1f}"]


def building() -> Iterator[Part]:
    """Builds of directories."""
    tower, floor, llama, slow = (
        row("wemoe-build", model=model, form=form) for model in ("clip-B-32", "1.2B") for form in ("pymerge", "floor")
    )
    walls = [f"{each['wall']['median']:.1f}" for each in (tower, floor, llama, slow)]
    peaks = [f"{each['peak'] / 2**20:.0f}" for each in (tower, llama)]
    words = "tower {} s (floor {} s; {} MiB at the peak), a 1.2 B Llama {} s for {} GiB written"
    written = f"{llama['bytes_written'] / 2**30:.1f}"
    yield Said(PAGE, words, [walls[0], walls[1], peaks[0], walls[2], written])
    yield Said(PAGE, "took {} s: the first to write that much; {} MiB)", [walls[3], peaks[1]])


def accuracies() -> list[str]:
    """The glyph experts, merged and routed."""
    named: list[tuple[str, Content]] = [("individual experts", row("wemoe-glyphs", kind="individual"))]
    named += [(said, row("wemoe-glyphs", kind="static", name=name)) for name, said in MERGES.items()]
    for found in sorted(rows("wemoe-glyphs", kind="wemoe"), key=lambda each: each["modules"] != "mlp"):
        what = "MLPs and attention routed, " if found["modules"] != "mlp" else ""
        named.append((f"WEMoE, {what}{found['name']}, gates of {GATES[found['reduce']]}", found))
    named += [(f"own {said}", row("wemoe-glyphs", name=f"each task's own {name}")) for name, said in OWN.items()]
    columns = (*TASKS, "mean", "recovered")
    lines = [[said, *(f"{each[key]:.2f}" if key in each else "" for key in columns)] for said, each in named]
    return table(["", *columns], lines)
