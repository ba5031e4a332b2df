"""Ray runs merges on the machines of a cluster: a task for each output file. `merge` is `pymerge merge --ray`."""

from __future__ import annotations

from pymerge.integrations.ray.merge import merge

__all__ = ["merge"]
