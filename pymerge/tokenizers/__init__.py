"""Tokenizers of the models and of the output: vocabularies, their files, and which rows tokens have."""
