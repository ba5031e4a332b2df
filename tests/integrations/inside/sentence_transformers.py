"""pymerge's methods in `SentenceTransformer.merge` and its kin; run by tests/integrations/test_mergekit.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from torch import Tensor

import pymerge
from pymerge.integrations.mergekit import register_methods

register_methods(prefixed=True)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def bert(folder: Path, kind: type[Any], **settings: Any) -> str:
    """A small BERT on the disk, with a tokenizer."""
    kind(transformers.BertConfig(**SIZES, **settings)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def sentences(folder: Path) -> SentenceTransformer:
    modules = pytest.importorskip("sentence_transformers.models")
    transformer = modules.Transformer(bert(folder / "bert", transformers.BertModel))
    dense = modules.Dense(in_features=16, out_features=8)
    return SentenceTransformer(modules=[transformer, modules.Pooling(16), dense], device="cpu")


def crossed(folder: Path) -> CrossEncoder:
    return CrossEncoder(bert(folder / "bert", transformers.BertForSequenceClassification, num_labels=1), device="cpu")


def sparse(folder: Path) -> SparseEncoder:
    """With the head of a masked language model, whose matrix is the table of embeddings."""
    return SparseEncoder(bert(folder / "bert", transformers.BertForMaskedLM), device="cpu")


MAKERS = {"SentenceTransformer": sentences, "CrossEncoder": crossed, "SparseEncoder": sparse}


def fine_tuned(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(1e-2 * torch.randn_like(parameter))
    return expert


def state(model: Any) -> dict[str, Tensor]:
    """The model's tensors, tied ones once."""
    unique = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {
        name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items() if name in unique.values()
    }


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], list[Any]]:
    def models(kind: str) -> list[Any]:
        torch.manual_seed(0)
        base = MAKERS[kind](tmp_path)
        return [base, fine_tuned(base, 1), fine_tuned(base, 2)]

    return models


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("wudi_flow", "wudi_flow", {}),
    ("wudi", "wudi", {"iterations": 5}),
    ("swudi", "swudi", {}),
    ("ace", "ace", {}),
    ("iso_c", "iso_c", {}),
    ("tsv_m", "tsv_m", {}),
    ("pymerge_ties", "ties", {"weight": 1.0, "density": 0.5}),
    ("pymerge_dare_ties", "dare_ties", {"weight": 1.0, "density": 0.5}),
]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("name", "method", "parameters"), CASES)
def test_merges_are_pymerges(
    made: Callable[[str], list[Any]], kind: str, name: str, method: str, parameters: dict[str, Any]
) -> None:
    base, *experts = made(kind)
    cls = getattr(sentence_transformers, kind)
    given = {key: value for key, value in parameters.items() if key != "weight"}  # which is 1 of itself
    merged = cls.merge(experts, name, base_model=base, parameters=given)
    ours = pymerge.merge_state_dicts(state(base), [state(expert) for expert in experts], method, **parameters)
    theirs = state(merged)
    assert theirs.keys() == ours.keys()
    assert max(float((theirs[key] - ours[key]).abs().max()) for key in ours) == 0.0
    moved = [key for key, tensor in state(base).items() if not torch.equal(tensor, theirs[key])]
    assert len(moved) > len(ours) // 2


@pytest.mark.parametrize(("name", "parameters"), [("linear", {}), ("ties", {"density": 0.5}), ("wudi_flow", {})])
def test_merged_folders_load_and_are_the_same(
    made: Callable[[str], list[Any]], tmp_path: Path, name: str, parameters: dict[str, Any]
) -> None:
    """`pymerge merge` of folders, and `SentenceTransformer.merge` of models by mergekit's own methods and ours."""
    base, *experts = made("SentenceTransformer")
    for folder, model in zip(("base", "e0", "e1"), (base, *experts), strict=True):
        model.save(str(tmp_path / folder))
    with_base = {} if name == "linear" else {"base_model": str(tmp_path / "base")}
    weight = {} if name == "wudi_flow" else {"weight": 1.0}
    models = [{"model": str(tmp_path / folder)} for folder in ("e0", "e1")]
    document = {"merge_method": name, "models": models, "parameters": parameters | weight, **with_base}
    pymerge.merge(document, tmp_path / "out", device="cpu", progress=False)
    ours = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    theirs = SentenceTransformer.merge(experts, name, parameters=parameters, **(with_base and {"base_model": base}))
    for key, tensor in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], tensor, atol=1e-6), key
    assert torch.allclose(torch.as_tensor(ours.encode(["a b c"])), torch.as_tensor(theirs.encode(["a b c"])), atol=1e-5)
