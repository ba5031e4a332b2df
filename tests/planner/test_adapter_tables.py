"""Adapters of embeddings and heads: tied, resized, with rows of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.adapter_merges import (
    EMBEDDING,
    HEAD,
    MODULES,
    STEM,
    config,
    merged,
    planned,
    refusal,
    same,
)
from tests.helpers.adapters import factors, write_adapter
from tests.helpers.checkpoints import Tensors, llama, llama_config, write_model
from tests.helpers.vocabularies import bpe


def written(folder: Path, tensors: Tensors, *, tied: bool = True, base: Tensors | None = None, **said: Any) -> Path:
    base = base or llama(tied=tied)
    write_model(folder / "base", base, config=llama_config(base, tied=tied))
    write_adapter(folder / "a", {f"{STEM}{name}": tensor for name, tensor in tensors.items()}, **said)
    return config(folder, "a", parameters={"weight": 1.0})


def both() -> Tensors:
    """Factors of embedding and head, as PEFT writes them where it keeps the two tied."""
    a, b = torch.randn(4, 32), torch.randn(16, 4)
    embedding = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    return embedding | {"lm_head.lora_A.weight": b.T.contiguous(), "lm_head.lora_B.weight": a.T.contiguous()}


def test_a_tied_table_is_changed_once(tmp_path: Path) -> None:
    tensors = both()
    found = merged(written(tmp_path, tensors))
    a, b = tensors["model.embed_tokens.lora_embedding_A"], tensors["model.embed_tokens.lora_embedding_B"]
    expected = llama(tied=True)[EMBEDDING].double() + 2 * (b.double() @ a.double()).T
    torch.testing.assert_close(found[EMBEDDING].double(), expected, rtol=1e-5, atol=1e-5)


def test_tied_tables_beside_their_factors(tmp_path: Path) -> None:
    tensors, table = both(), llama(tied=True)[EMBEDDING]
    plain = merged(written(tmp_path / "plain", tensors))
    stored = {f"{module}.base_layer.weight": table.clone() for module in ("model.embed_tokens", "lm_head")}
    path = written(tmp_path / "stored", tensors | stored)
    same(merged(path), plain)
    assert planned(path).warnings == ()


def test_trained_rows_of_a_longer_tied_table(tmp_path: Path) -> None:
    """As PEFT writes them where tokens have been added: the longer table beside them, all of it twice."""
    table, rows = torch.randn(34, 16), torch.ones(2, 16)
    tensors = {}
    for module in ("model.embed_tokens", "lm_head"):
        tensors[f"{module}.token_adapter.base_layer.weight"] = table.clone()
        tensors[f"{module}.token_adapter.trainable_tokens_delta"] = rows.clone()
    path = written(tmp_path, tensors, trainable_token_indices=[3, 33])
    path.write_text(path.read_text() + "vocabulary: base\n")
    expected = table[:32].clone()
    expected[3] = 1
    torch.testing.assert_close(merged(path)[EMBEDDING], expected)
    tensors["lm_head.token_adapter.trainable_tokens_delta"] += 1
    path = written(tmp_path / "other", tensors, trainable_token_indices=[3, 33])
    assert "changes lm_head alone" in refusal(path)


def test_a_tied_table_that_is_stored_twice(tmp_path: Path) -> None:
    base, tensors = llama(), both()
    base[HEAD] = base[EMBEDDING].clone()
    twice = merged(written(tmp_path / "twice", tensors, base=base))
    del base[HEAD]
    same(twice, merged(written(tmp_path / "once", tensors, base=base)))


def test_tied_tables_that_are_changed_differently(tmp_path: Path) -> None:
    tensors = both()
    tensors["lm_head.lora_B.weight"][0, 0] += 1
    assert "changes lm_head alone, which" in refusal(written(tmp_path, tensors))


@pytest.mark.parametrize("kept", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_tables(tmp_path: Path, kept: str) -> None:
    tensors = {name: tensor for name, tensor in both().items() if kept in name}
    assert "tie_word_embeddings: false" in refusal(written(tmp_path, tensors))


def test_a_tied_table_in_place_of_the_base_s(tmp_path: Path) -> None:
    other = {EMBEDDING: torch.ones(32, 16)}
    assert f"changes {EMBEDDING} alone" in refusal(written(tmp_path, other))
    kept = merged(written(tmp_path, other, ensure_weight_tying=True))[EMBEDDING]
    torch.testing.assert_close(kept, torch.ones(32, 16))
    stored = merged(written(tmp_path, other | {HEAD: torch.ones(32, 16)}))[EMBEDDING]
    torch.testing.assert_close(stored, torch.ones(32, 16))


def test_a_longer_vocabulary(tmp_path: Path) -> None:
    tensors = {EMBEDDING: torch.ones(35, 16), HEAD: torch.ones(35, 16)}
    path = written(tmp_path, tensors, tied=False)
    assert "vocabularies of different sizes; set vocabulary: base" in refusal(path)
    path.write_text(path.read_text() + "vocabulary: base\n")
    torch.testing.assert_close(merged(path)[EMBEDDING], torch.ones(32, 16))


def test_the_vocabulary_of_the_adapter_s_tokenizer(tmp_path: Path) -> None:
    base, longer = bpe(["ab"]), bpe(["ab"], ["<new>"])
    rows = base.get_vocab_size()
    tables = {EMBEDDING: torch.randn(rows + 1, 16), HEAD: torch.randn(rows + 1, 16)}
    path = written(tmp_path, tables, tied=False, base=llama(vocabulary=rows))
    base.save(str(tmp_path / "base" / "tokenizer.json"))
    longer.save(str(tmp_path / "a" / "tokenizer.json"))
    path.write_text(path.read_text() + "tokenizer_source: union\n")
    found = merged(path)
    assert found[EMBEDDING].shape == (rows + 1, 16)
    torch.testing.assert_close(found[EMBEDDING][-1], tables[EMBEDDING][-1])
    assert "<new>" in (tmp_path / "out" / "tokenizer.json").read_text()


def test_an_adapter_without_tokenizer_has_that_of_its_base(tmp_path: Path) -> None:
    base = bpe(["ab"])
    rows = base.get_vocab_size()
    tokens = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 16)}
    path = written(tmp_path, tokens, tied=False, base=llama(vocabulary=rows), trainable_token_indices=[2])
    base.save(str(tmp_path / "base" / "tokenizer.json"))
    path.write_text(path.read_text() + "tokenizer_source: base\n")
    torch.testing.assert_close(merged(path)[EMBEDDING][2], torch.ones(16))


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([3], "does not give as many"),
        ([3, 99], r"replaces row 99 of model.embed_tokens.weight, which has 32"),
        (None, "not give"),
    ],
)
def test_rows_that_are_not_there(tmp_path: Path, indices: list[int] | None, text: str) -> None:
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}
    assert text in refusal(written(tmp_path, rows, tied=False, trainable_token_indices=indices))


def test_a_head_that_the_base_has_not(tmp_path: Path) -> None:
    found = {f"{STEM}{name}": tensor for name, tensor in {"score.weight": torch.ones(2, 16)}.items()}
    tensors = factors(llama(), MODULES)
    path = written(tmp_path, {}, tied=False)
    write_adapter(tmp_path / "a", tensors | found)
    assert any("left out 1 tensor: score.weight" in warning for warning in planned(path).warnings)


def test_a_saved_module_that_the_file_has_not(tmp_path: Path) -> None:
    path = written(tmp_path, factors(llama(), MODULES[:1]), tied=False, modules_to_save=["lm_head", "score"])
    (said,) = [warning for warning in planned(path).warnings if "modules_to_save" in warning]
    assert "has no tensor of 'lm_head', which modules_to_save names: they are the base's" in said


def test_another_tensor_that_the_base_has_not(tmp_path: Path) -> None:
    path = written(tmp_path, {}, tied=False)
    write_adapter(tmp_path / "a", factors(llama(), MODULES) | {f"{STEM}model.extra.weight": torch.ones(16, 16)})
    assert "model.extra.weight, which" in refusal(path)


def test_a_tied_head_that_was_trained_whole(tmp_path: Path) -> None:
    """modules_to_save: [lm_head], which an output whose head is its table cannot hold."""
    assert f"changes {HEAD} alone" in refusal(written(tmp_path, {HEAD: torch.ones(32, 16)}))
    two = {EMBEDDING: torch.ones(32, 16), HEAD: torch.zeros(32, 16)}
    assert f"changes {HEAD} alone" in refusal(written(tmp_path / "two", two))
    same = {HEAD: llama(tied=True)[EMBEDDING], **factors(llama(), MODULES[:1])}
    assert planned(written(tmp_path / "same", same)).steps


def says_nothing(path: Path, architecture: str) -> Path:
    """The same merge, of a base whose config.json leaves it to its class whether the head is tied."""
    file = path.parent / "base" / "config.json"
    said = json.loads(file.read_text())
    del said["tie_word_embeddings"]
    file.write_text(json.dumps(said | {"architectures": [architecture]}))
    return path


def test_a_head_that_the_class_ties(tmp_path: Path) -> None:
    """No head is stored, or the table twice: then it is tied, whatever config.json leaves out."""
    alone = {name: tensor for name, tensor in both().items() if "embed_tokens" in name}
    text = "changes model.embed_tokens alone"
    assert text in refusal(says_nothing(written(tmp_path, alone), "GemmaForCausalLM"))
    base = llama()
    assert planned(says_nothing(written(tmp_path / "own", alone, base=base), "GemmaForCausalLM")).steps
    base[HEAD] = base[EMBEDDING].clone()
    assert text in refusal(says_nothing(written(tmp_path / "twice", alone, base=base), "GemmaForCausalLM"))


@pytest.mark.parametrize("architecture", ["LlamaModel", "BertForSequenceClassification", "BertForTokenClassification"])
def test_models_without_a_head_tie_none(tmp_path: Path, architecture: str) -> None:
    """config.json of a classifier says tie_word_embeddings: true as well, by its class's default."""
    tensors = {name: tensor for name, tensor in both().items() if "embed_tokens" in name}
    path = written(tmp_path, tensors)
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [architecture]}))
    a, b = tensors["model.embed_tokens.lora_embedding_A"], tensors["model.embed_tokens.lora_embedding_B"]
    expected = llama(tied=True)[EMBEDDING].double() + 2 * (b.double() @ a.double()).T
    torch.testing.assert_close(merged(path)[EMBEDDING].double(), expected, rtol=1e-5, atol=1e-5)


def test_trained_rows_of_another_width(tmp_path: Path) -> None:
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 5)}
    path = written(tmp_path, rows, tied=False, trainable_token_indices=[1, 3], target_modules=["q_proj"])
    said = refusal(path)
    assert "has rows of [5], and model.embed_tokens.weight of" in said
    assert "is [32, 16]; name the model that the adapter is for" in said
