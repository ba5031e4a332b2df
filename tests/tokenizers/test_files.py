"""Tokenizer files of the output, chat templates, and what is refused before anything is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from pymerge import api
from pymerge.errors import PlanError
from pymerge.tokenizers.templates import BUILTIN
from tests.helpers.checkpoints import change, load_output, pymerge, refused
from tests.helpers.vocabularies import EMBEDDING, HEAD, bpe, unigram, word_piece, write

TALK = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
]


def write_merge(folder: Path, more: str, source: str | None = "union") -> Path:
    """The config of three models, `more` from line 7 on."""
    lines = ["merge_method: linear", "base_model: base", "models:", "  - model: base", "  - model: e0", "  - model: e1"]
    lines += ["parameters: {weight: 0.5}"] if "parameters" not in more else []
    lines += [f"tokenizer_source: {source}"] if source else []
    (folder / "merge.yml").write_text("\n".join([*lines, more]) + "\n")
    return folder / "merge.yml"


def three(folder: Path, templates: tuple[str | None, ...] = (None, None, None)) -> None:
    made = (bpe(["cat"]), bpe(["cat", "dog"], ["<tool>"]), bpe(["cat"], [AddedToken("<|end|>", special=True)]))
    for number, (name, tokenizer) in enumerate(zip(("base", "e0", "e1"), made, strict=True)):
        write(folder / name, tokenizer, number, template=templates[number])


def merged(folder: Path, more: str = "", source: str | None = "union") -> Any:
    """Merge, and load the output's tokenizer."""
    api.merge(write_merge(folder, more, source), folder / "out", device="cpu", progress=False, overwrite=True)
    return AutoTokenizer.from_pretrained(folder / "out")


def problems(folder: Path, more: str = "", source: str | None = "union") -> list[str]:
    with pytest.raises(PlanError) as caught:
        api.plan(write_merge(folder, more, source))
    return caught.value.problems


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_files_that_would_contradict_are_left_out(tmp_path: Path) -> None:
    three(tmp_path)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "notes.txt"):
        (tmp_path / "base" / name).write_text("{}")
    merged(tmp_path)
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert "notes.txt" in present
    assert present.isdisjoint({"vocab.json", "merges.txt", "added_tokens.json"})
    assert (
        "not carried over: added_tokens.json, merges.txt, vocab.json"
        in api.plan(tmp_path / "merge.yml").tokens.lines[-1]
    )
    merged(tmp_path, source="base")
    assert (tmp_path / "out/vocab.json").read_text() == "{}"


def test_the_tokenizer_of_a_model_brings_its_ids(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / "e0/vocab.json").write_text('{"of": 0}')
    (tmp_path / "base/merges.txt").write_text("")
    edit(tmp_path / "e0/config.json", eos_token_id=[2, 9], pad_token_id=0)
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.9}')
    (tmp_path / "e0/generation_config.json").write_text('{"eos_token_id": [2, 9], "top_p": 0.1}')
    merged(tmp_path, source="e0")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == ([2, 9], 0)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 9], "top_p": 0.9}
    assert (out / "vocab.json").read_text() == '{"of": 0}'
    assert not (out / "merges.txt").exists()


def test_a_tokenizer_without_a_model(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / "own").mkdir()
    tokenizer = bpe(["dog", "cow"])
    tokenizer.save(str(tmp_path / "own/tokenizer.json"))
    loaded = merged(tmp_path, source="own")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert load_output(tmp_path / "out")[EMBEDDING].shape[0] == tokenizer.get_vocab_size()


@pytest.mark.parametrize("make", [bpe, word_piece, unigram])
def test_tokens_without_rows_are_left_out(make: Any, tmp_path: Path) -> None:
    tokenizer = make(["cat", "dog"], ["<tool>"])
    size = tokenizer.get_vocab_size()
    for number, name in enumerate(("base", "e0", "e1")):
        write(tmp_path / name, tokenizer, number, rows=size - 2)
    loaded = merged(tmp_path, source="base")
    assert set(tokenizer.get_vocab()) - set(loaded.get_vocab()) == {"<tool>", "dog"}
    assert load_output(tmp_path / "out")[HEAD].shape[0] == size - 2
    assert any("2 tokens beyond the" in warning for warning in api.plan(tmp_path / "merge.yml").warnings)
    assert "dog" not in loaded.convert_ids_to_tokens(loaded.encode("dog"))


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("listed", [False, True])
def test_where_added_tokens_are_named(place: str, listed: bool, tmp_path: Path) -> None:
    """The ids are those of transformers, in the input and in the output."""
    three(tmp_path)
    made = bpe(["cat", "dog"], ["<tool>"])
    tensors = write(tmp_path / "e0", made, 1, rows=20)
    if place == "special_tokens_map.json":
        (tmp_path / "e0" / place).write_text("{}")
    if place == "added_tokens.json":
        (tmp_path / "e0" / place).write_text(json.dumps({"<pad>": made.get_vocab_size()}))
    else:
        edit(tmp_path / "e0" / place, pad_token="<pad>")
    if listed:
        decoder = {str(made.token_to_id("<tool>")): {"content": "<tool>", "normalized": True}}
        edit(tmp_path / "e0/tokenizer_config.json", added_tokens_decoder=decoder)
    before = AutoTokenizer.from_pretrained(tmp_path / "e0").get_vocab()
    after = merged(tmp_path, source="e0")
    assert after.get_vocab() == before
    union = merged(tmp_path).get_vocab()
    assert ("<pad>" in union) == ("<pad>" in before)
    if "<pad>" in union:
        row = load_output(tmp_path / "out")[EMBEDDING][union["<pad>"]]
        torch.testing.assert_close(row, tensors[EMBEDDING][before["<pad>"]])
    if not listed:
        assert before["<pad>"] == made.get_vocab_size()


def test_a_list_of_added_tokens_is_kept_up(tmp_path: Path) -> None:
    three(tmp_path)
    flags = {"special": True, "normalized": False}
    edit(tmp_path / "base/tokenizer_config.json", added_tokens_decoder={"2": {"content": "</s>", **flags}})
    ids = merged(tmp_path).get_vocab()
    decoder = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(number): token["content"] for number, token in decoder.items()}.items() >= {
        (ids[token], token) for token in ("</s>", "dog", "<tool>", "<|end|>")
    }
    assert [decoder[str(ids[token])]["special"] for token in ("dog", "<tool>", "<|end|>")] == [False, False, True]


def test_templates(tmp_path: Path) -> None:
    three(tmp_path, ("{{ 'base' }}", "{{ 'two' }}\n", "{{ 'two' }}"))
    assert merged(tmp_path).chat_template == "{{ 'base' }}"
    assert merged(tmp_path, "chat_template: auto").chat_template == "{{ 'two' }}"
    assert merged(tmp_path, "chat_template: auto", source="base").chat_template == "{{ 'two' }}"
    assert merged(tmp_path, "chat_template: '{{ messages }}'").chat_template == "{{ messages }}"
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    (tmp_path / "e0/chat_template.jinja").write_text("{{ 'base' }}")  # wins over tokenizer_config.json
    assert merged(tmp_path, "chat_template: auto").chat_template == "{{ 'base' }}"


def test_a_template_alone_needs_no_vocabulary(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "e0", "e1")):
        write(tmp_path / name, bpe(["cat"]), number, template="{{ 'a' }}")
        (tmp_path / name / "chat_template.json").write_text('{"chat_template": "old"}')
    assert merged(tmp_path, "chat_template: chatml", source=None).chat_template == BUILTIN["chatml"]
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    assert not (out / "chat_template.json").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>system\nshort<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nshort<|eot_id|><|start_header_id|>user<|end_h"),
        ("mistral", "<s> [INST] short\n\nhi [/INST] yo</s> [INST] bye [/INST]"),
        ("alpaca", "short\n\n### Instruction:\nhi\n\n### Response:\nyo\n\n### Instruction:\nbye\n\n### Response:\n"),
        (
            "exaone",
            "[|system|]short[|endofturn|]\n[|user|]hi\n[|assistant|]yo[|endofturn|]\n[|user|]bye\n[|assistant|]",
        ),
    ],
)
def test_builtin_templates(name: str, expected: str, tmp_path: Path) -> None:
    write(tmp_path, bpe(["cat"]), 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = BUILTIN[name]
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True).startswith(expected)


def test_models_without_a_usable_tokenizer(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / "e0/tokenizer.json").rename(tmp_path / "e0/tokenizer.model")
    (tmp_path / "e1/tokenizer.json").write_text('{"model": {}}')
    found = problems(tmp_path)
    assert len(found) == 2
    assert found[0].startswith(
        f"{tmp_path / 'merge.yml'}:5: {tmp_path / 'e0'}: its tokenizer is stored as tokenizer.model"
    )
    assert "write its tokenizer.json (AutoTokenizer.from_pretrained, then save_pretrained)" in found[0]
    assert f"merge.yml:6: {tmp_path / 'e1/tokenizer.json'}: cannot be loaded by the tokenizers library" in found[1]
    (tmp_path / "e0/tokenizer.model").unlink()
    (tmp_path / "e1/tokenizer_config.json").write_text("[]")
    refused(tmp_path, 3, tmp_path / "e1/tokenizer_config.json", "is no JSON object")
    (tmp_path / "e1/tokenizer_config.json").unlink()
    assert (
        "has no tokenizer.json; put the model's tokenizer files there, or delete tokenizer_source"
        in problems(tmp_path)[0]
    )


def without_the_library() -> None:
    sys.modules.update(dict.fromkeys(["tokenizers"]))  # None: importing it fails


def test_without_the_library(tmp_path: Path) -> None:
    three(tmp_path)
    write_merge(tmp_path, "")
    done = pymerge("plan", tmp_path / "merge.yml", before=without_the_library)
    assert done.code == 4, done
    assert "the library tokenizers is needed; pip install 'pymerge-engine[tokenizers]'" in done.errors[0]
    for name in ("base", "e0", "e1"):
        write(tmp_path / name, bpe(["cat"]), 0)
    write_merge(tmp_path, "chat_template: chatml", source=None)  # needs none
    assert pymerge("plan", tmp_path / "merge.yml", before=without_the_library).code == 0


def test_files_that_are_not_text(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / "e0/chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    write_merge(tmp_path, "")
    refused(tmp_path, 3, tmp_path / "e0/chat_template.jinja", "is not UTF-8")


def test_ids_that_contradict_each_other(tmp_path: Path) -> None:
    three(tmp_path)
    token: Mapping[str, Any] = {"content": "cat", "special": False}
    edit(tmp_path / "e0/tokenizer_config.json", added_tokens_decoder={"3": token})
    assert "gives token 'cat' the id 3, by tokenizer.json it is 10" in problems(tmp_path)[0]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("<new>: {source: e0}", "token '<new>': model e0 has no token '<new>'; name a model that has it"),
        ("dog: {source: e1, force: true}", "token 'dog': model e1 has no token 'dog'"),
        (
            "<new>: {source: {kind: model_token, model: e1, token: bird}}",
            "token '<new>': model e1 has no token 'bird'",
        ),
        (
            "<new>: {source: {kind: model_token, model: base, token_id: 8}}",
            "token '<new>': model base has 8 rows, none with number 8; write a smaller token_id",
        ),
    ],
)
def test_tokens_without_a_row(token: str, expected: str, tmp_path: Path) -> None:
    three(tmp_path)
    found = problems(tmp_path, f"tokenizer:\n  tokens:\n    {token}", source=None)
    assert len(found) == 1
    assert found[0].startswith(f"{tmp_path / 'merge.yml'}:10: {expected}")


def test_sources_and_tables_that_do_not_fit(tmp_path: Path) -> None:
    three(tmp_path)
    assert f"{tmp_path / 'merge.yml'}:8: " in problems(tmp_path, source="e2")[0]
    assert "model 'e2' not found" in problems(tmp_path, source="e2")[0]
    assert (
        "'some/model' is no model of this merge; download its tokenizer" in problems(tmp_path, source="some/model")[0]
    )
    change(tmp_path / "e1", lambda tensors: tensors.update({HEAD: torch.zeros(30, 16)}))
    assert any("lm_head.weight" in problem and "30" in problem for problem in problems(tmp_path))
    change(tmp_path / "base", lambda tensors: tensors.update({HEAD: torch.zeros(30, 16)}))
    change(tmp_path / "e0", lambda tensors: tensors.update({HEAD: torch.zeros(30, 16)}))
    assert "has token tables of different lengths (lm_head.weight 30, model.embed" in problems(tmp_path)[0]
    (tmp_path / "base/tokenizer.json").unlink()
    (tmp_path / "base/tokenizer_config.json").unlink()
    assert (
        "base has no tokenizer files; delete chat_template"
        in problems(tmp_path, "vocabulary: base\nchat_template: auto", None)[0]
    )


def test_keys_that_exclude_each_other(tmp_path: Path) -> None:
    three(tmp_path)
    write_merge(tmp_path, "vocabulary: base\ntokenizer: {source: base}")
    refused(tmp_path, 2, "merge.yml:8: tokenizer_source and tokenizer are both given; keep one of them")
    write_merge(tmp_path, "vocabulary: base")
    refused(tmp_path, 2, "merge.yml:9: vocabulary has no meaning beside tokenizer_source")


def test_the_plan_tells(tmp_path: Path) -> None:
    three(tmp_path)
    write_merge(tmp_path, "")
    done = pymerge("plan", tmp_path / "merge.yml", env={"COLUMNS": "200"})
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert "vocabulary  union: 15 tokens, 15 rows in lm_head.weight, model.embed_tokens.weight" in lines
    assert f"  {tmp_path / 'base'}: 8 tokens, 8 rows; rows: 8 own, 7 of other models" in lines
    assert "  written: tokenizer.json" in lines


def test_the_files_are_the_same_each_time(tmp_path: Path) -> None:
    three(tmp_path)
    write_merge(tmp_path, "")
    outputs = []
    for seed in ("1", "2"):
        done = pymerge("merge", tmp_path / "merge.yml", tmp_path / seed, env={"PYTHONHASHSEED": seed})
        assert done.code == 0, done
        names = ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json")
        outputs.append([(tmp_path / seed / name).read_bytes() for name in names])
    assert outputs[0] == outputs[1]
    assert Tokenizer.from_str(outputs[0][0].decode()).get_vocab_size() == 15
