"""Merges of models with other tokenizers: which token gets which row, and what AutoTokenizer loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from pymerge import api
from pymerge.engine.recheck import recheck
from pymerge.output.verify import verify
from tests.helpers.checkpoints import Tensors, load_output, tree
from tests.helpers.vocabularies import EMBEDDING, HEAD, bpe, unigram, word_piece, write

Make = Callable[..., Tokenizer]
KINDS = pytest.mark.parametrize("make", [bpe, word_piece, unigram])
WEIGHTS = {"base": 0.2, "e0": 0.5, "e1": 0.3}
TOOL = AddedToken("<tool>", lstrip=True)


class Models:
    """Three models in a folder: their tokens' numbers and tensors, and merges of them."""

    def __init__(self, folder: Path, make: Make = bpe, **options: Any) -> None:
        self.folder = folder
        made = {
            "base": make(["cat", "dog"]),
            "e0": make(["dog", "cat", "bird"], [AddedToken("<|im_end|>", special=True)]),
            "e1": make(["cat", "fish", "dog", "bird"], [TOOL]),
        }
        self.ids = {name: tokenizer.get_vocab() for name, tokenizer in made.items()}
        self.tensors: dict[str, Tensors] = {}
        for number, (name, tokenizer) in enumerate(made.items()):
            self.tensors[name] = write(folder / name, tokenizer, number, **options)

    def config(self, method: str = "linear", **keys: Any) -> dict[str, Any]:
        names = ["base", "e0", "e1"] if method == "linear" else ["e0", "e1"]
        models = [{"model": str(self.folder / name), "parameters": {"weight": WEIGHTS[name]}} for name in names]
        return {"merge_method": method, "base_model": str(self.folder / "base"), "models": models, **keys}

    def merge(self, out: str = "out", method: str = "linear", **keys: Any) -> tuple[dict[str, int], Tensors]:
        """Merge; the ids that AutoTokenizer loads, and the tensors."""
        api.merge(self.config(method, **keys), self.folder / out, device="cpu", progress=False)
        ids = AutoTokenizer.from_pretrained(self.folder / out).get_vocab()
        assert ids == Tokenizer.from_file(str(self.folder / out / "tokenizer.json")).get_vocab()
        return ids, load_output(self.folder / out)

    def row(self, table: str, token: str, model: str, donors: Sequence[str]) -> torch.Tensor:
        """A model's row of a token, in float64: its own, or the average of the donors' that have it."""
        having = [model] if token in self.ids[model] else [name for name in donors if token in self.ids[name]]
        rows = [self.tensors[name][table][self.ids[name][token]].double() for name in having]
        return torch.stack(rows).float().double().mean(0) if rows else torch.zeros(16).double()

    def expected(self, table: str, token: str, method: str = "linear") -> torch.Tensor:
        """The merged row by mergekit's rule: the base's row where there is one, else the owners' average."""
        donors = ["base"] if token in self.ids["base"] else ["e0", "e1"]
        rows = {name: self.row(table, token, name, donors).float().double() for name in WEIGHTS}
        if method == "linear":
            return sum((WEIGHTS[name] * row for name, row in rows.items()), torch.zeros(16).double())
        deltas = [WEIGHTS[name] * (rows[name] - rows["base"]) for name in ("e0", "e1")]
        return rows["base"] + deltas[0] + deltas[1]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.allclose(found.double(), expected, rtol=2e-7, atol=2e-7))


@KINDS
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_union(make: Make, method: str, tmp_path: Path) -> None:
    models = Models(tmp_path, make)
    ids, merged = models.merge(method=method, tokenizer_source="union")
    assert set(ids) == set().union(*models.ids.values())
    assert all(ids[token] == number for token, number in models.ids["base"].items())
    plain = [t for name in ("e0", "e1") for t, _ in sorted(models.ids[name].items(), key=lambda item: item[1])]
    fresh = [t for t in dict.fromkeys(plain) if t not in models.ids["base"]]
    ordered = [t for t in fresh if not t.startswith("<")] + [t for t in fresh if t.startswith("<")]
    assert [ids[token] for token in ordered] == list(range(len(models.ids["base"]), len(ids)))
    for table in (EMBEDDING, HEAD):
        assert merged[table].shape == (len(ids), 16)
        for token, number in ids.items():
            assert close(merged[table][number], models.expected(table, token, method)), (table, token)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == len(ids)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "dog cat fish bird <tool><|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == text.replace("><", "> <").split()
    assert tokenizer.added_tokens_decoder[ids["<tool>"]].lstrip
    assert tokenizer.added_tokens_decoder[ids["<|im_end|>"]].special
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([tokenizer.encode(text)])).logits.shape[-1] == len(ids)


@KINDS
def test_base_and_one_model(make: Make, tmp_path: Path) -> None:
    models = Models(tmp_path, make)
    for source, owner in (("base", "base"), (str(tmp_path / "e1"), "e1")):
        ids, merged = models.merge(f"out-{owner}", tokenizer_source=source)
        assert ids == models.ids[owner]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / f"out-{owner}" / name).read_bytes() == (tmp_path / owner / name).read_bytes()
        for token, number in ids.items():
            assert close(merged[EMBEDDING][number], models.expected(EMBEDDING, token)), token


def test_without_a_base_owners_are_averaged(tmp_path: Path) -> None:
    models = Models(tmp_path)
    config = models.config(tokenizer_source="union")
    del config["base_model"]
    api.merge(config, tmp_path / "out", device="cpu", progress=False)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    merged = load_output(tmp_path / "out")[EMBEDDING]
    for token, number in ids.items():
        rows = [WEIGHTS[name] * models.row(EMBEDDING, token, name, list(WEIGHTS)) for name in WEIGHTS]
        assert close(merged[number], rows[0] + rows[1] + rows[2]), token


def test_tokens_with_sources_of_their_own(tmp_path: Path) -> None:
    models = Models(tmp_path)
    tokens = {
        "bird": {"source": {"kind": "zero"}},
        "dog": {"source": str(tmp_path / "e0"), "force": True},
        "cat": {"source": str(tmp_path / "e1")},  # all have it: nothing to fill in
        "<new>": {"source": {"kind": "model_token", "model": str(tmp_path / "e0"), "token": "cat"}},
        "<newer>": {"source": {"kind": "model_token", "model": str(tmp_path / "e1"), "token_id": 4}},
        "<newest>": {},
    }
    config = models.config(tokenizer={"source": "base", "tokens": tokens})
    warnings = api.plan(config).warnings
    assert any("no model has a row for '<newest>'; zeros are used" in warning for warning in warnings), warnings
    ids, merged = models.merge(tokenizer={"source": "base", "tokens": tokens})
    assert list(sorted(ids, key=lambda token: ids[token]))[-4:] == ["bird", "<new>", "<newer>", "<newest>"]

    def row(name: str, token: str) -> torch.Tensor:
        return models.tensors[name][HEAD][models.ids[name][token]].double()

    own = sum((WEIGHTS[name] * row(name, "bird") for name in ("e0", "e1")), torch.zeros(16).double())
    expected = {
        "bird": own,
        "dog": row("e0", "dog"),
        "cat": models.expected(HEAD, "cat"),
        "<new>": row("e0", "cat"),
        "<newer>": models.tensors["e1"][HEAD][4].double(),
        "<newest>": torch.zeros(16).double(),
    }
    for token, wanted in expected.items():
        assert close(merged[HEAD][ids[token]], wanted), token


def test_padding(tmp_path: Path) -> None:
    models = Models(tmp_path)
    ids, merged = models.merge(tokenizer={"source": "union", "pad_to_multiple_of": 16})
    rows = -(-len(ids) // 16) * 16
    assert merged[EMBEDDING].shape[0] == rows > len(ids)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows
    mean = merged[EMBEDDING][: len(ids)].double().mean(0)  # of a linear merge: the merge of the means
    assert all(close(row, mean) for row in merged[EMBEDDING][len(ids) :])


def test_padded_tables_keep_their_rows(tmp_path: Path) -> None:
    models = Models(tmp_path, rows=40)
    ids, merged = models.merge(tokenizer_source="union")
    assert merged[EMBEDDING].shape == (40, 16)
    last = sum((WEIGHTS[name] * models.tensors[name][EMBEDDING][39].double() for name in WEIGHTS), torch.zeros(16))
    assert close(merged[EMBEDDING][39], last)
    cut, small = models.merge("cut", tokenizer={"source": "union", "pad_to_multiple_of": 1})
    assert cut == ids
    assert torch.equal(small[HEAD], merged[HEAD][: len(ids)])


@pytest.mark.parametrize("tied", [False, True])
def test_equal_tokenizers_change_nothing(tied: bool, tmp_path: Path) -> None:
    for number, name in enumerate(("base", "e0", "e1")):
        write(tmp_path / name, bpe(["cat", "dog"]), number, rows=20, tied=tied)
    models = [{"model": str(tmp_path / name)} for name in ("e0", "e1")]
    config = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models}
    config["parameters"] = {"weight": 0.5}
    plain = api.plan(config)
    for source in ("union", "base"):
        plan = api.plan(config | {"tokenizer_source": source})
        assert plan.steps == plain.steps
        assert (plan.tokens.files, plan.tokens.dropped) == ({}, frozenset())
        assert plan.tokens.lines[1].endswith("20 rows; all rows where they are")


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    models = Models(tmp_path, tied=True)
    ids, merged = models.merge(tokenizer_source="union")
    assert HEAD not in merged
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, merged[EMBEDDING])
    assert model.lm_head.weight.shape[0] == len(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_the_same_bytes_for_any_pieces(dtype: torch.dtype, tmp_path: Path) -> None:
    models = Models(tmp_path, dtype=dtype)
    config = models.config(tokenizer={"source": "union", "pad_to_multiple_of": 64})
    for out, limits in (("one", {}), ("two", {"memory": "6KiB"})):
        api.merge(config, tmp_path / out, device="cpu", progress=False, **limits)
    assert len(api.plan(config, memory="6KiB").steps[0].pieces) > len(api.plan(config).steps[0].pieces)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_output_has_the_dtypes_of_the_base(tmp_path: Path) -> None:
    models = Models(tmp_path, dtype=torch.bfloat16)
    models.tensors["e1"] = write(tmp_path / "e1", bpe(["cat", "fish", "dog", "bird"], [TOOL]), 2)
    ids, merged = models.merge(tokenizer_source="union")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for token, number in ids.items():
        assert torch.allclose(merged[HEAD][number].double(), models.expected(HEAD, token), rtol=2**-8), token


def test_heads_with_biases_and_other_heads(tmp_path: Path) -> None:
    """BERT's head: a bias for each token, a tied table, and a dense layer that has none of it."""
    made = {"base": word_piece(["cat"]), "e0": word_piece(["dog", "cat"])}
    biases = {}
    for seed, (name, tokenizer) in enumerate(made.items()):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertForMaskedLM(BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=9, **sizes))
        biases[name] = model.cls.predictions.bias.data.normal_()
        model.save_pretrained(tmp_path / name)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in made]
    config = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    api.merge(config, tmp_path / "out", device="cpu", progress=False)
    found = BertForMaskedLM.from_pretrained(tmp_path / "out")
    ids = {name: tokenizer.get_vocab() for name, tokenizer in made.items()}
    expected = [(biases["base"][ids["base"][token]] + biases["e0"][ids["e0"][token]]) / 2 for token in ids["base"]]
    bias = found.cls.predictions.bias.detach()
    torch.testing.assert_close(torch.stack([bias[number] for number in ids["base"].values()]), torch.stack(expected))
    assert bias[ids["base"]["cat"] + 1] == biases["e0"][ids["e0"]["dog"]]
    assert found.get_input_embeddings().weight.shape[0] == len(bias) == 5


def test_verify_and_resume_know_the_tokenizer(tmp_path: Path) -> None:
    models = Models(tmp_path)
    models.merge(tokenizer_source="union")
    assert verify(tmp_path / "out").problems == []
    again = recheck(tmp_path / "out", None)
    assert (again.problems, again.changes) == ([], [])
    assert {EMBEDDING, HEAD} <= set(again.tensors)
    report = api.merge(models.config(tokenizer_source="union"), tmp_path / "out", device="cpu", progress=False)
    assert report.already_done
    plan = api.plan(models.config(tokenizer_source="union"))
    write(tmp_path / "e1", bpe(["cat", "fish", "dog", "bird"], ["<tool>"]), 2)
    changed = api.plan(models.config(tokenizer_source="union"))
    assert plan.tokens.digest != changed.tokens.digest
    (tmp_path / "out/tokenizer.json").write_text("{}")
    assert any("tokenizer.json: is not as it was written" in problem for problem in verify(tmp_path / "out").problems)
