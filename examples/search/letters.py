"""Tiny language models and tasks for them, all made here: what the search by the lm-evaluation-harness runs on to show
that it runs. The base repeats a letter whatever the word before it; one expert says the next one after "up", the other
the one before after "down"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefgh"
BASE = "same"
SHIFTS: Mapping[str, int] = {"up": 1, "down": -1}  # by the tasks' words
_STEPS = 120


def make(folder: Path) -> tuple[Path, list[Path], list[str]]:
    """Make base, experts and tasks in a new folder; returns their folders, and the names of the tasks."""
    words = ["<s>", BASE, *SHIFTS, *LETTERS]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(words)}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=16, **sizes))
    paths = {}
    for word in (BASE, *SHIFTS):
        if paths:
            model = LlamaForCausalLM.from_pretrained(paths[BASE])
        _train(model, tokenizer, {each: SHIFTS.get(each, 0) if each == word else 0 for each in (BASE, *SHIFTS)})
        paths[word] = folder / word
        model.save_pretrained(paths[word])
        tokenizer.save_pretrained(paths[word])
    names = [_task(folder / "tasks", word, shift) for word, shift in SHIFTS.items()]
    return paths[BASE], [paths[word] for word in SHIFTS], names


def _shifted(letter: str, shift: int) -> int:
    return (LETTERS.index(letter) + shift) % len(LETTERS)


def _train(model: nn.Module, tokenizer: PreTrainedTokenizerFast, shifts: Mapping[str, int]) -> None:
    """Teach a model what follows each word and a letter."""
    pairs = [(word, letter) for word in shifts for letter in LETTERS]
    lines = [f"{word} {letter} {LETTERS[_shifted(letter, shifts[word])]}" for word, letter in pairs]
    tokens = torch.tensor([tokenizer.encode(line) for line in lines])
    labels = tokens.clone()
    labels[:, :2] = -100
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimiser.step()


def _task(folder: Path, word: str, shift: int) -> str:
    """A task of the harness with its data beside it; returns its name."""
    folder.mkdir(exist_ok=True)
    name = f"letters_{word}"
    rows = [{"letter": letter, "answer": _shifted(letter, shift)} for letter in LETTERS]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": word + " {{letter}}",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(said, indent=1))  # JSON is YAML, too
    return name
