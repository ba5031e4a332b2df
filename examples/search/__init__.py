"""Searches for coefficients of merges, on the experts of examples/glyphs."""
