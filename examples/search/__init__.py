"""Searches for coefficients of merges: on the experts of examples/glyphs, and by tasks of language models."""
