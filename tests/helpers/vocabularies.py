"""Tiny tokenizers of every kind, and Llama checkpoints with their vocabularies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.helpers.checkpoints import Tensors, llama, llama_config, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = ("<unk>", "<s>", "</s>")


def bpe(words: Sequence[str], added: Sequence[str | AddedToken] = ()) -> Tokenizer:
    """Special tokens, all letters of the words, then what merging each word from the left gives; then added tokens."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    merges = []
    for letter in sorted(set("".join(words))):
        vocabulary.setdefault(letter, len(vocabulary))
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer, added)


def word_piece(words: Sequence[str], added: Sequence[str | AddedToken] = ()) -> Tokenizer:
    """Special tokens, then whole words."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *words))}
    return _finished(Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>")), added)


def unigram(words: Sequence[str], added: Sequence[str | AddedToken] = ()) -> Tokenizer:
    """Special tokens, then whole words, the first the most probable."""
    scores = [(token, -float(number)) for number, token in enumerate((*SPECIAL, *words))]
    return _finished(Tokenizer(models.Unigram(scores, 0)), added)


def _finished(tokenizer: Tokenizer, added: Sequence[str | AddedToken]) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    for token in added:
        tokenizer.add_tokens([token])
    return tokenizer


def weights(rows: int, seed: int, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Tensors:
    """A Llama with random token tables of this length; all seeds have the other tensors in common."""
    tensors = llama(vocabulary=rows, tied=tied)
    generator = torch.Generator().manual_seed(seed)
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write(
    folder: Path,
    tokenizer: Tokenizer | None,
    seed: int,
    *,
    rows: int | None = None,
    tied: bool = False,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Tensors:
    """Write a model with this tokenizer and as many rows as it has tokens, or `rows`; returns its tensors."""
    size = tokenizer.get_vocab_size() if tokenizer is not None else 8
    tensors = weights(rows or size, seed, tied=tied, dtype=dtype)
    files = {}
    if tokenizer is not None:
        named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        if template is not None:
            described["chat_template"] = template
        files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(described)}
    name = str(dtype).removeprefix("torch.")
    write_model(folder, tensors, config=llama_config(tensors, tied=tied, dtype=name) | config, files=files)
    return tensors
