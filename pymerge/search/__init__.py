"""Search for coefficients of merges: MAP, fronts of what is best for some preference of the tasks."""

from pymerge.search.fronts import Front, map

__all__ = ["Front", "map"]
