"""Usual spellings: of norms and weight norm, by the model's own names and shapes."""

from __future__ import annotations

import pytest

from pymerge.architecture.spellings import spelling, usual


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"a.LayerNorm.gamma": (4,), "a.LayerNorm.beta": (4,)}, ["a.LayerNorm.weight", "a.LayerNorm.bias"]),
        ({"a.ln.gamma": (4,), "a.ln.beta": (4,)}, ["a.ln.weight", "a.ln.bias"]),
        ({"final_layer_norm.gamma": (4,)}, ["final_layer_norm.weight"]),
        ({"ls1.gamma": (4,)}, ["ls1.gamma"]),
        ({"ls1.gamma": (4,), "ls1.beta": (5,)}, ["ls1.gamma", "ls1.beta"]),
        ({"norm.gamma": (4,), "norm.weight": (4,)}, ["norm.gamma", "norm.weight"]),
        (
            {"c.parametrizations.weight.original0": (1,), "c.parametrizations.weight.original1": (4, 2)},
            ["c.weight_g", "c.weight_v"],
        ),
        ({"c.parametrizations.weight.original": (4,)}, ["c.parametrizations.weight.original"]),
        ({"gamma": (4,)}, ["gamma"]),
        ({"_orig_mod.a.norm.gamma": (4,), "b._checkpoint_wrapped_module.w": (4,)}, ["a.norm.weight", "b.w"]),
        ({"_orig_mod.a.w": (4,), "a.w": (4,)}, ["_orig_mod.a.w", "a.w"]),
    ],
)
def test_usual_names(names: dict[str, tuple[int, ...]], expected: list[str]) -> None:
    assert usual(names) == dict(zip(names, expected, strict=True))


def test_words_that_differ() -> None:
    assert spelling("a.norm.gamma", "a.norm.weight") == "gamma"
    assert spelling("c.parametrizations.weight.original0", "c.weight_g") == "parametrizations.weight.original0"
    assert spelling("a.b", "a.b") == ""
