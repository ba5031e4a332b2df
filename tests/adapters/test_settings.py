"""adapter_config.json: scales by patterns, and what is refused with its remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pymerge.adapters.settings import Settings, read_settings
from pymerge.errors import CheckpointError

FILE = Path("somewhere/adapter_config.json")
Q = "model.layers.11.self_attn.q_proj"


def settings(**said: Any) -> Settings:
    return read_settings(FILE, {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **said})


SCALES: dict[str, tuple[dict[str, Any], float, int]] = {
    "plain": ({}, 2.0, 8),
    "rank-stabilised": ({"use_rslora": True}, 16 / math.sqrt(8), 8),
    "a rank of its own": ({"rank_pattern": {"q_proj": 4}}, 4.0, 4),
    "rank-stabilised with one": ({"use_rslora": True, "rank_pattern": {"q_proj": 4}}, 8.0, 4),
    "alpha of its own": ({"alpha_pattern": {"q_proj": 4}}, 0.5, 8),
    "both": ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"self_attn.q_proj": 2}}, 0.5, 4),
    "the first that fits": ({"rank_pattern": {"q_proj": 4, "layers.11.self_attn.q_proj": 2}}, 4.0, 4),
    "regular expressions": ({"rank_pattern": {r"layers\.(1|11)\..*_proj": 2}}, 8.0, 2),
    "a dot is any letter": ({"rank_pattern": {"self.attn.q.proj": 2}}, 8.0, 2),
    "not the end": ({"rank_pattern": {"self_attn": 2}}, 2.0, 8),
    "not a whole word": ({"rank_pattern": {"_proj": 2, "1.self_attn.q_proj": 2}}, 2.0, 8),
    "a type as PEFT prints it": ({"peft_type": "PeftType.LORA"}, 2.0, 8),
    "alpha 0": ({"lora_alpha": 0}, 0.0, 8),
}


@pytest.mark.parametrize("what", SCALES)
def test_scale_and_rank(what: str) -> None:
    said, scale, rank = SCALES[what]
    found = settings(**said).scale(Q)
    assert found.value == pytest.approx(scale, rel=1e-15)
    assert found.rank == rank


def test_several_patterns_are_said() -> None:
    found = settings(rank_pattern={"q_proj": 4, ".*": 2}).scale(Q)
    assert found.rank == 4
    assert found.several == ("q_proj", ".*")


def test_token_indices_by_module() -> None:
    assert settings(trainable_token_indices=[3, 1]).token_indices("model.embed_tokens") == (3, 1)
    named = settings(trainable_token_indices={"embed_tokens": [3], "lm_head": [4]})
    assert named.token_indices("model.embed_tokens") == (3,)
    assert named.token_indices("lm_head") == (4,)
    assert named.token_indices("model.other") is None


MERGE, CONVERT = "merge_and_unload", "save_as_lora"
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{kind: ({"peft_type": kind}, (kind, MERGE, CONVERT)) for kind in ("LOHA", "LOKR", "VERA")},
    **{kind: ({"peft_type": kind}, (kind, MERGE)) for kind in ("IA3", "OFT", "ADALORA", "HIRA", "NEW")},
    **{
        kind: ({"peft_type": kind}, (kind, "changes no weights", "leave it out"))
        for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "XLORA", "POLY", "CARTRIDGE", "LILY", "SHADOW")
    },
    "another library": ({"peft_type": None, "config": {}}, ("names neither a peft_type nor a fine_tune_type",)),
    "activated": ({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens", "leave it out")),
    "Arrow": ({"arrow_config": {"top_k": 2}}, ("arrow_config",)),
    "QALoRA": ({"use_qalora": True}, ("use_qalora", MERGE)),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, ("layer_replication", "leave it out")),
    "KaSA": ({"kasa_config": {"beta": 1}}, ("kasa_config", MERGE)),
    "Megatron": ({"megatron_config": {"a": 1}}, ("megatron_config", MERGE)),
    **{
        init: ({"init_lora_weights": init}, (init, "path_initial_model_for_weight_conversion"))
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga")
    },
    "LoftQ": ({"init_lora_weights": "loftq"}, ("loftq", "name that one as base", "init_lora_weights: true")),
    "an unknown start": ({"init_lora_weights": "novel"}, ("init_lora_weights: 'novel'", MERGE)),
    "no rank": ({"r": 0}, ("r is '0'", "whole number from 1 on")),
    "rank as text": ({"r": "8"}, ("r is '8'",)),
    "alpha as text": ({"lora_alpha": "x"}, ("lora_alpha is 'x'", "a number")),
    "patterns as a list": ({"rank_pattern": ["q"]}, ("rank_pattern is", "a mapping")),
    "no number in a pattern": ({"alpha_pattern": {"q": None}}, ("alpha_pattern['q'] is 'None'",)),
    "no rank in a pattern": ({"rank_pattern": {"q": 0}}, ("rank_pattern['q'] is '0'",)),
    "no expression": ({"rank_pattern": {"q(": 2}}, ("rank_pattern has 'q('", "no regular expression", "; correct it")),
    "blocks": ({"use_bdlora": {"nblocks": 0}}, ("use_bdlora", "nblocks")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_remedy(what: str) -> None:
    said, fragments = REFUSED[what]
    with pytest.raises(CheckpointError) as caught:
        settings(**said)
    for fragment in (str(FILE), *fragments):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_plain_starts_are_read(init: Any) -> None:
    assert not settings(init_lora_weights=init).notes


def test_settings_of_a_newer_version_are_said() -> None:
    assert "ignored twist" in settings(twist={"a": 1}, turn=False).notes[0]


@pytest.mark.parametrize("key", ["target_parameters", "modules_to_save"])
def test_lists_of_names(key: str) -> None:
    found = settings(**{key: "experts.down_proj"})
    assert (found.parameters or found.saved) == ("experts.down_proj",)
    for wrong in (3, [3], {"x": 1}):
        with pytest.raises(CheckpointError, match=f"{key} is .*a list of names"):
            settings(**{key: wrong})
