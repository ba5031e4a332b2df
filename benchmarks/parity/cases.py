"""The configs of the parity check: every method of mergekit, and a grid of its options, on four architectures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

LAYERS = 4  # of every model that parity_peer makes


@dataclass(frozen=True)
class Case:
    """One merge that both tools do. `document` names models as base, e1, e2, e3."""

    name: str
    family: str
    document: Mapping[str, Any]
    random: bool = False  # draws masks: compared by statistics
    gathers: bool = False  # brings token tables into the order of a new vocabulary, whose ids may be others

    def text(self, folder: str, dtype: Mapping[str, str]) -> str:
        """The YAML with models in `folder`."""
        return yaml.safe_dump({**_placed(dict(self.document), folder), **dtype}, sort_keys=False)


def _placed(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {
            key: f"{folder}/{inner}"
            if key in ("model", "base_model") or _names_expert(key, inner)
            else _placed(inner, folder)
            for key, inner in value.items()
        }
    return [_placed(inner, folder) for inner in value] if isinstance(value, list) else value


def _names_expert(key: str, value: Any) -> bool:
    """Whether this is the source of tokens, and a model."""
    return key in ("source", "tokenizer_source") and value in ("e1", "e2", "e3")


def _models(*parameters: Mapping[str, Any], base: bool = False) -> list[dict[str, Any]]:
    """e1, e2, ... with these parameters; the base before them if asked."""
    listed = [
        {"model": f"e{number}", **({"parameters": dict(each)} if each else {})}
        for number, each in enumerate(parameters, 1)
    ]
    return [*([{"model": "base"}] if base else []), *listed]


_WEIGHTS = ({"weight": 0.2}, {"weight": 0.5}, {"weight": 0.3})
_GRADIENT = [{"filter": "attn", "value": [0.1, 0.9, 0.4]}, {"filter": "attention", "value": [0.9, 0.2]}, {"value": 0.5}]


def _weighted(**more: Any) -> list[dict[str, Any]]:
    return _models(*({**each, **more} for each in _WEIGHTS))


def _plain() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, document) of every deterministic method and option, for whole models."""
    yield "linear", {"merge_method": "linear", "models": _weighted()}
    yield (
        "linear, not normalised",
        {"merge_method": "linear", "models": _weighted(), "parameters": {"normalize": False}},
    )
    yield "linear, negative weight", {"merge_method": "linear", "models": _models({"weight": 1.5}, {"weight": -0.5})}
    gradient = [
        {"model": "e1", "parameters": {"weight": [0.0, 1.0]}},
        {"model": "e2", "parameters": {"weight": _GRADIENT}},
    ]
    yield "linear, gradients and filters", {"merge_method": "linear", "models": gradient}
    for method, options in _FAMILY:
        label = ", ".join([method, *(f"{key} {value}" for key, value in options.items())])
        each = {key: value for key, value in options.items() if key in ("density", "gamma")}
        whole = {key: value for key, value in options.items() if key not in each}
        document = {"merge_method": method, "base_model": "base", "models": _weighted(**each)}
        yield label, {**document, **({"parameters": whole} if whole else {})}
    for t in (0.0, 0.3, 1.0, _GRADIENT):
        label = "gradient" if isinstance(t, list) else t
        two = {"base_model": "base", "models": _models({}, base=True), "parameters": {"t": t}}
        yield f"slerp, t {label}", {"merge_method": "slerp", **two}
        yield (
            f"nearswap, t {label}",
            {"merge_method": "nearswap", **two, "parameters": {"t": 1e-3 if label == 0.3 else t}},
        )
    pair = _models({"weight": 0.7}, {"weight": 0.4})
    for base in ({}, {"base_model": "base"}):
        for options in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}):
            label = ", ".join(["nuslerp", *base, *(f"{key} {value}" for key, value in options.items())])
            yield label, {"merge_method": "nuslerp", **base, "models": pair, "parameters": dict(options)}
        yield ", ".join(["multislerp", *base]), {"merge_method": "multislerp", **base, "models": _weighted()}
    yield "karcher", {"merge_method": "karcher", "models": _models({}, {}, {})}
    yield (
        "karcher, 3 iterations",
        {
            "merge_method": "karcher",
            "models": _models({}, {}, {}),
            "parameters": {"max_iter": 3, "tol": 1e-9},
        },
    )
    for method, options in _OTHERS:
        label = ", ".join([method, *(f"{key} {value}" for key, value in options.items())])
        count = 1 if method == "arcee_fusion" else 3
        document = {"merge_method": method, "base_model": "base", "models": _models(*({},) * count)}
        yield label, {**document, **({"parameters": dict(options)} if options else {})}
    yield "passthrough", {"merge_method": "passthrough", "models": _models({})}
    yield "passthrough, scale", {"merge_method": "passthrough", "models": _models({"scale": 0.5})}


_FAMILY: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {}),
    ("task_arithmetic", {"lambda": 0.7, "normalize": True}),
    ("ties", {}),
    ("ties", {"density": 0.5}),
    ("ties", {"density": 0.2, "normalize": False, "lambda": 0.6}),
    ("ties", {"density": 0.5, "rescale": True}),
    ("ties", {"density": 0.5, "int8_mask": True}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.3}),
    ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1, "lambda": 1.2}),
]
_OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("arcee_fusion", {}),
    ("ram", {}),
    ("ram", {"epsilon": 1e-3}),
    ("ramplus_tl", {}),
    ("ramplus_tl", {"epsilon": 1e-3, "r": 0.3, "alpha": 0.5}),
]
_RANDOM: list[tuple[str, dict[str, Any]]] = [
    ("dare_linear", {"density": 0.5}),
    ("dare_linear", {"density": 0.3, "rescale": False}),
    ("dare_ties", {"density": 0.5}),
    ("dare_ties", {"density": 0.7, "normalize": True}),
    ("della", {"density": 0.5, "epsilon": 0.2}),
    ("della_linear", {"density": 0.6, "epsilon": 0.1, "lambda": 0.8}),
]


def _sliced() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, document) of merges of layer ranges."""

    def source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
        return {"model": model, "layer_range": [start, stop], **({"parameters": parameters} if parameters else {})}

    stacked = [{"sources": [source("e1", 0, 3)]}, {"sources": [source("e2", 1, LAYERS)]}]
    yield "slices, stacked", {"merge_method": "passthrough", "slices": stacked}
    scaled = [{"sources": [source("e1", 0, 2, scale=[{"filter": "o_proj", "value": 0.0}, {"value": 1.0}])]}]
    yield "slices, scaled", {"merge_method": "passthrough", "slices": [*scaled, {"sources": [source("e2", 2, LAYERS)]}]}
    ranged = [
        {"sources": [source("e1", 0, 2, weight=[0.2, 0.8]), source("e2", 2, 4, weight=0.5)]},
        {"sources": [source("e3", 1, 4, weight=1.0)]},
    ]
    yield "slices, linear", {"merge_method": "linear", "slices": ranged}
    both = [{"sources": [source("base", 0, LAYERS), source("e1", 0, LAYERS)]}]
    yield (
        "slices, slerp",
        {"merge_method": "slerp", "base_model": "base", "slices": both, "parameters": {"t": [0.1, 0.8]}},
    )
    inside = [
        {
            "sources": [source("base", 0, 3), source("e1", 0, 3, weight=0.4), source("e2", 0, 3, weight=0.6)],
            "parameters": {"lambda": 0.5},
        }
    ]
    yield "slices, task_arithmetic", {"merge_method": "task_arithmetic", "base_model": "base", "slices": inside}


def _gathered() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, document) of merges of models with vocabularies of their own: `parity_peer.TOKENS` has them."""
    tokens = {
        "<a>": {"source": "e1"},
        "<b>": {"source": "e2", "force": True},
        "<c>": {"source": {"kind": "zero"}},
        "w5": {"source": {"kind": "model_token", "model": "e2", "token": "w7"}, "force": True},
        "w6": {"source": {"kind": "model_token", "model": "e1", "token_id": 9}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "base", "token": "w4"}},
    }
    keys: dict[str, dict[str, Any]] = {
        "union": {"tokenizer_source": "union"},
        "of the base": {"tokenizer_source": "base"},
        "of a model": {"tokenizer_source": "e1"},
        "with sources": {"tokenizer": {"source": "union", "tokens": tokens}},
        "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}},
    }
    for name, key in keys.items():
        every = [{"model": "base", "parameters": {"weight": 0.3}}, *_weighted()]
        yield f"vocabulary {name}, linear", {"merge_method": "linear", "base_model": "base", "models": every, **key}
        for method in ("task_arithmetic", "ties"):
            document = {"merge_method": method, "base_model": "base", "models": _weighted(), **key}
            yield f"vocabulary {name}, {method}", document
        two = {"base_model": "base", "models": _models({}, base=True), "parameters": {"t": 0.3}}
        if "tokens" not in key.get("tokenizer", {}):  # those name models that are not merged
            yield f"vocabulary {name}, slerp", {"merge_method": "slerp", **two, **key}


def cases() -> Iterator[Case]:
    """All of them: every method on every family; slices and random masks on two; vocabularies on one of their own."""
    for name, document in _gathered():
        yield Case(name, "words", document, gathers=True)
    for family in ("llama", "gpt2", "bert", "qwen_moe"):
        for name, document in _plain():
            yield Case(name, family, document)
    for family in ("llama", "gpt2"):
        for name, document in _sliced():
            yield Case(name, family, document)
        for method, options in _RANDOM:
            each = {key: value for key, value in options.items() if key in ("density", "epsilon")}
            whole = {key: value for key, value in options.items() if key not in each}
            document = {"merge_method": method, "base_model": "base", "models": _models({"weight": 1.0, **each})}
            label = ", ".join([method, *(f"{key} {value}" for key, value in options.items())])
            yield Case(label, family, {**document, **({"parameters": whole} if whole else {})}, random=True)
