"""Solvers on task vectors that are products of factors: the same merges, computed in the space that the factors span.

All of it is float64 on one thread: cores are as small as the ranks together.
"""
