"""Models whose configs, tokens or templates disagree: what a plan says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pymerge import api
from pymerge.errors import PlanError
from tests.helpers.checkpoints import (
    CARRIED,
    fine_tuned,
    llama,
    llama_config,
    pymerge,
    write_config,
    write_model,
    write_models,
)
from tests.helpers.vocabularies import word_piece
from tests.helpers.vocabularies import write as write_tokens

BASE = llama()
CONFIG = llama_config(BASE) | {"rope_theta": 500000.0, "eos_token_id": 1}


def models(folder: Path, first: dict[str, Any], second: dict[str, Any], **settings: Any) -> Path:
    """A base and two experts, with these keys of their config.json beside the base's."""
    write_models(folder, BASE, config=CONFIG, **settings)
    for name, keys in (("e0", first), ("e1", second)):
        (folder / name / "config.json").write_text(json.dumps(CONFIG | keys))
    return folder


def tokenizer(*tokens: str, added: tuple[str, ...] = ()) -> str:
    behind = [{"id": len(tokens) + number, "content": token} for number, token in enumerate(added)]
    vocab = {token: number for number, token in enumerate(tokens)}
    return json.dumps({"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": behind})


def told(folder: Path, method: str = "task_arithmetic", **settings: Any) -> tuple[str, ...]:
    return api.plan(write_config(folder, method, **settings)).warnings


def test_models_that_agree_say_nothing(tmp_path: Path) -> None:
    models(tmp_path, {"rope_theta": 500000, "torch_dtype": "bfloat16"}, {"_name_or_path": "x"}, files=CARRIED)
    assert told(tmp_path) == ()


def test_a_key_is_named_with_all_values_and_the_outputs(tmp_path: Path) -> None:
    models(tmp_path, {"rope_theta": 2e7}, {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}})
    (warning,) = told(tmp_path)
    assert warning.startswith(f"{tmp_path / 'base/config.json'}: rope_theta is 500000.0, and ")
    assert f"20000000.0 in {tmp_path / 'e0/config.json'}" in warning
    assert f"rope_parameters.rope_theta is 1000000.0 in {tmp_path / 'e1/config.json'}" in warning
    assert "the output has 500000.0: write another into its config.json" in warning
    done = pymerge("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert done.code == 0
    assert f"warning: {warning}" in done.err
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 500000.0


def test_nobody_is_told_to_write_another_type_into_config_json(tmp_path: Path) -> None:
    models(tmp_path, {"model_type": "mistral"}, {})
    (warning,) = told(tmp_path)
    assert 'model_type is "llama", and "mistral" in ' in warning
    assert warning.endswith('the output has "llama": see that both types compute the same with these weights')


def test_models_with_the_same_value_share_a_line(tmp_path: Path) -> None:
    models(tmp_path, {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-5})
    (warning,) = told(tmp_path)
    assert "rms_norm_eps is 1e-06 (by default), and 1e-05 in" in warning
    assert f"{tmp_path / 'e0/config.json'}, {tmp_path / 'e1/config.json'}" in warning


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_attention_heads", 4, "num_attention_heads is 2, and 4"),
        ("hidden_act", "gelu", 'hidden_act is "silu" (by default), and "gelu"'),
        ("head_dim", 4, "head_dim is 8 (by default), and 4"),
    ],
)
def test_what_no_weights_are_right_for_is_refused(tmp_path: Path, key: str, value: Any, said: str) -> None:
    models(tmp_path, {"rope_theta": 1e6}, {key: value})
    for method in ("task_arithmetic", "linear"):
        with pytest.raises(PlanError) as caught:
            told(tmp_path, method)
        assert f"{tmp_path / 'base/config.json'}: {said} in {tmp_path / 'e1/config.json'}; no weights" in str(
            caught.value
        )
        assert "rope_theta (500000.0; 1000000.0)" in caught.value.problems[-1]


def test_tokens_that_end_a_text(tmp_path: Path) -> None:
    models(
        tmp_path,
        {"eos_token_id": [1]},
        {"eos_token_id": [2, 3]},
        files={"generation_config.json": '{"eos_token_id": 1}'},
    )
    (tmp_path / "e0/generation_config.json").write_text('{"eos_token_id": [1, 4], "temperature": 0.6}')
    one, two = told(tmp_path)
    assert f"base/config.json: eos_token_id is 1, and [2, 3] in {tmp_path / 'e1/config.json'}" in one
    assert f"base/generation_config.json: eos_token_id is 1, and [1, 4] in {tmp_path / 'e0'}" in two


def test_a_chat_template_that_the_output_lacks(tmp_path: Path) -> None:
    models(tmp_path, {}, {}, files={"tokenizer_config.json": '{"eos_token": "</s>"}'})
    (tmp_path / "e0/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "e1/tokenizer_config.json").write_text('{"chat_template": "{{ messages }}\\n", "eos_token": "<end>"}')
    tokens, template = told(tmp_path)
    assert 'eos_token is "</s>", and "<end>" in ' in tokens
    files = f"{tmp_path / 'e0/chat_template.jinja'}, {tmp_path / 'e1/tokenizer_config.json'}"
    assert template.startswith(f"{files}: have a chat template, {tmp_path / 'base'} and the output have none; ")
    assert len(told(tmp_path, more="chat_template: auto")) == 1
    (tmp_path / "base/chat_template.jinja").write_text("{{ others }}")
    assert "another chat template than the output, which has that of" in told(tmp_path)[-1]
    for name in ("base", "e0"):
        (tmp_path / name / "chat_template.jinja").write_text("{{ messages }} \n")
    assert len(told(tmp_path)) == 1


def test_tables_of_other_tokens(tmp_path: Path) -> None:
    models(tmp_path, {}, {}, files={"tokenizer.json": tokenizer("a", "b", "c")})
    assert told(tmp_path) == ()
    (tmp_path / "e0/tokenizer.json").write_text(tokenizer("a", "b", "c", added=("<call>",)))
    (tmp_path / "e1/tokenizer.json").write_text(json.dumps(json.loads(tokenizer("a", "c", "b")), indent=1))
    one, two = told(tmp_path)
    assert one.startswith(f"{tmp_path / 'e0/tokenizer.json'}: not the vocabulary of {tmp_path / 'base'}; 1 token has")
    assert "('<call>': none there, 3 here)" in one
    assert "2 tokens have another number ('b': 1 there, 2 here)" in two
    assert "set tokenizer_source" in two


def test_the_models_of_a_module_count_for_what_they_take_part_in(tmp_path: Path) -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in BASE.items()}
    tensors |= {f"vision_tower.{name}": tensor for name, tensor in llama(blocks=1, tied=True).items()}
    config = {"model_type": "llava", "text_config": CONFIG, "vision_config": {"model_type": "v", "num_heads": 2}}
    write_model(tmp_path / "base", tensors, config=config)
    changed = {
        **config,
        "text_config": CONFIG | {"rope_theta": 1e6},
        "vision_config": {"model_type": "v", "num_heads": 4},
    }
    write_model(tmp_path / "e0", fine_tuned(tensors, 0), config=changed)
    write_model(tmp_path / "e1", fine_tuned(tensors, 1), config=config)
    form = (
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {{weight: 1}}\nmodules:\n"
        "  language_model: {{models: [{{model: {0}}}]}}\n  vision_tower: {{models: [{{model: {1}}}]}}\n"
    )
    (warning,) = planned(tmp_path, form, "e0", "e1")
    assert "text_config.rope_theta is 500000.0, and 1000000.0" in warning
    with pytest.raises(PlanError, match=r"vision_config\.num_heads is 2, and 4") as caught:
        planned(tmp_path, form, "e1", "e0")
    assert "rope_theta" not in str(caught.value)


def planned(folder: Path, form: str, *names: str) -> tuple[str, ...]:
    (folder / "merge.yml").write_text(form.format(*names))
    return api.plan(folder / "merge.yml").warnings


def test_stages_are_compared_by_what_they_will_write(tmp_path: Path) -> None:
    models(tmp_path, {}, {"rope_theta": 1e6}, files={"chat_template.jinja": "x", "tokenizer_config.json": "{}"})
    stage = "name: one\nmerge_method: linear\nmodels:\n- {model: e0, parameters: {weight: 1}}\n"
    model = "- {model: %s, parameters: {weight: 1}}\n"
    last = f"---\nmerge_method: linear\nmodels:\n{model}{model}"
    (tmp_path / "multi.yml").write_text(stage + last % ("one", "base"))
    done = pymerge("multi", tmp_path / "multi.yml", tmp_path / "out")
    assert done.code == 0
    assert "warning" not in done.err
    (tmp_path / "multi.yml").write_text(stage + last % ("one", "e1"))
    done = pymerge("multi", tmp_path / "multi.yml", tmp_path / "out2")
    assert done.code == 0
    assert "rope_theta is 500000.0, and 1000000.0" in done.err


def test_the_tokenizer_of_another_model_decides_its_ids(tmp_path: Path) -> None:
    """With the tokenizer of e1 the output has its ids; rows are matched by token, and nothing is said of numbers."""
    for name, words, ids in (("base", ["a", "b"], 3), ("e0", ["a", "b"], 3), ("e1", ["b", "a"], 4)):
        write_tokens(tmp_path / name, word_piece(words), 1, eos_token_id=ids)
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "e1/generation_config.json").write_text('{"eos_token_id": [4]}')
    *ids, numbers = told(tmp_path)
    assert [warning.partition(": ")[0] for warning in ids] == [
        str(tmp_path / "base" / name) for name in ("config.json", "generation_config.json")
    ]
    assert "2 tokens have another number ('a': 3 there, 4 here)" in numbers
    one, two = told(tmp_path, more="tokenizer_source: e1")
    assert "eos_token_id is 3, and 4 in" in one
    assert "the output has 4: " in one
    assert "the output has [4]: " in two
