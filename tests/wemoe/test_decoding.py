"""Prompts and decoding: padding changes no gates, and the gates of a prompt hold for what is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from pymerge import wemoe
from pymerge.errors import ArgumentError
from pymerge.testing.compare import assert_same
from pymerge.wemoe.modules import RoutedLinear
from tests.helpers.routed import FLOAT32, relative, spread


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_does_not_change_gates(tiny: Callable[[str], Any], name: str) -> None:
    model, inputs, experts = tiny(name)
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32))
    tokens = inputs["input_ids"]
    routed(input_ids=tokens)
    expected = routed.gates()
    padded = torch.cat([tokens, torch.full((3, 4), 7)], 1)
    mask = torch.cat([torch.ones(3, 7), torch.zeros(3, 4)], 1).long()
    for arguments, named in (((padded, mask), {}), ((), {"input_ids": padded, "attention_mask": mask})):
        routed(*arguments, **named)
        for path, rows in routed.gates().items():
            assert torch.allclose(rows, expected[path], rtol=1e-5, atol=1e-6)
    routed(input_ids=padded)
    assert not all(torch.allclose(rows, expected[path], atol=1e-4) for path, rows in routed.gates().items())


def test_padding_of_encoder_and_decoder(tiny: Callable[[str], Any]) -> None:
    model, inputs, experts = tiny("t5")
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32))
    expected = routed(**inputs).logits
    gates = routed.gates()
    source = torch.cat([inputs["input_ids"], torch.full((3, 2), 9)], 1)
    mask = torch.cat([torch.ones(3, 7), torch.zeros(3, 2)], 1).long()
    found = routed(input_ids=source, attention_mask=mask, decoder_input_ids=inputs["decoder_input_ids"]).logits
    assert relative(found, expected) < 1e-5
    assert all(torch.allclose(rows, gates[path], rtol=1e-5, atol=1e-6) for path, rows in routed.gates().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_keeps_the_gates_of_the_prompt(tiny: Callable[[str], Any], name: str, beams: int) -> None:
    """Against plain models merged by each prompt's gates, each generating alone; twice, so gates are computed anew."""
    model, inputs, experts = tiny(name)
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32))
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    for tokens in (inputs["input_ids"], inputs["input_ids"].flip(0)[:2]):
        found = routed.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)
        gates = {
            path: rows[::beams] if len(rows) == beams * len(tokens) else rows for path, rows in routed.gates().items()
        }
        for row in range(len(tokens)):
            plain: Any = routed.static({path: rows[row] for path, rows in gates.items()})
            prompt = tokens[row : row + 1]
            assert_same("tokens", found[row : row + 1], plain.generate(input_ids=prompt, **settings))


def test_decoding_steps_reuse_gates_and_a_new_prompt_does_not(tiny: Callable[[str], Any]) -> None:
    model, inputs, experts = tiny("llama")
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32))
    tokens = inputs["input_ids"]
    prefill = routed(input_ids=tokens, use_cache=True)
    gates = routed.gates()
    step = routed(input_ids=tokens[:, :1], past_key_values=prefill.past_key_values)
    assert all(torch.equal(rows, gates[path]) for path, rows in routed.gates().items())
    for row in range(3):
        plain: Any = routed.static({path: rows[row] for path, rows in gates.items()})
        whole = torch.cat([tokens, tokens[:, :1]], 1)[row : row + 1]
        assert relative(step.logits[row, -1], plain(input_ids=whole).logits[0, -1]) < 1e-5
    routed(input_ids=tokens.flip(1))
    assert not any(torch.equal(rows, gates[path]) for path, rows in routed.gates().items())
    cache = routed(input_ids=tokens, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    many = routed(input_ids=tokens[:, :1].repeat_interleave(2, 0), past_key_values=cache).logits
    assert relative(many[::2], step.logits) < 1e-5
    cache.batch_select_indices(torch.tensor([0, 2, 4, 0]))
    with pytest.raises(ArgumentError, match="4 sequences are decoded after a prefill of 3"):
        routed(input_ids=tokens[[0, 1, 2, 0], :1], past_key_values=cache)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_prompt_is_decoded_with_weights_that_are_mixed_once(tiny: Callable[[str], Any], backend: str) -> None:
    model, inputs, experts = tiny("llama")
    routed = spread(wemoe.upscale(model, experts, storage=FLOAT32))
    routed.backend = backend
    layers = {name: layer for name, layer in routed.model.named_modules() if isinstance(layer, RoutedLinear)}
    seen: list[Tensor] = []
    for row in (0, 1):
        prompt = inputs["input_ids"][row : row + 1]
        with torch.no_grad():
            cache = routed(input_ids=prompt, past_key_values=DynamicCache(config=model.config)).past_key_values
        plain: Any = routed.static({path: rows[0] for path, rows in routed.gates().items()})
        mixed = {name: layer.mixed_weight for name, layer in layers.items()}
        for name, weight in mixed.items():
            assert weight is not None
            assert relative(weight, plain.get_submodule(name).weight) < 1e-6
        seen.append(next(weight for weight in mixed.values() if weight is not None))
        step = routed(input_ids=prompt[:, :1], past_key_values=cache).logits
        assert relative(step[0, -1], plain(input_ids=torch.cat([prompt, prompt[:, :1]], 1)).logits[0, -1]) < 1e-5
        assert all(layer.mixed_weight is mixed[name] for name, layer in layers.items())
    assert not torch.equal(*seen)
    routed(input_ids=inputs["input_ids"])
    assert all(layer.mixed_weight is None for layer in layers.values())
    pruned = wemoe.upscale(model, experts, storage=wemoe.StorageSpec(kind="pruned", ratio=0.5))
    pruned.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, pad_token_id=0)
    assert all(layer.mixed_weight is None for layer in pruned.modules() if isinstance(layer, RoutedLinear))
