"""Grams of the inputs of linear weights: `pymerge collect`."""
