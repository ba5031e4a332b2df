"""mergekit with pymerge inside: as its engine, and as methods of its registry.

import pymerge.integrations.mergekit as pymerge_in_mergekit
pymerge_in_mergekit.replace_engine()    # mergekit.merge.run_merge is pymerge's, for all that call it
pymerge_in_mergekit.register_methods()  # wudi, ace, ... are methods of mergekit
"""

from __future__ import annotations

from pymerge.integrations.mergekit.engine import replace_engine, restore_engine
from pymerge.integrations.mergekit.methods import register_methods

__all__ = ["register_methods", "replace_engine", "restore_engine"]
