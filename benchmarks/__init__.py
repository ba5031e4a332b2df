"""Measurements of pymerge: `python -m benchmarks --help`."""
