"""Tokenizers of the models and of the output: vocabularies, their files, and which rows tokens have."""

from __future__ import annotations

from pymerge.tokenizers.files import Files, Vocabulary, read_files, read_json, read_vocabularies, read_vocabulary
from pymerge.tokenizers.output import tokenizer_files, union, with_tokens, without_rows_beyond
from pymerge.tokenizers.planned import TokenPlan, describe_rows, plan_files
from pymerge.tokenizers.settings import BASE, UNION, TokenizerSettings, take_tokenizer
from pymerge.tokenizers.templates import choose_template

__all__ = [
    "BASE",
    "UNION",
    "Files",
    "TokenPlan",
    "TokenizerSettings",
    "Vocabulary",
    "choose_template",
    "describe_rows",
    "plan_files",
    "read_files",
    "read_json",
    "read_vocabularies",
    "read_vocabulary",
    "take_tokenizer",
    "tokenizer_files",
    "union",
    "with_tokens",
    "without_rows_beyond",
]
