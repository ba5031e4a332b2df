"""Adds pymerge's configs to Hydra's search path, so that FusionBench finds method=pymerge/<method> by itself.

Hydra imports it in every program: it imports nothing else.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class PymergeConfig(SearchPathPlugin):
    """Finds the configs of pymerge.integrations.fusion_bench_config."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the configs behind those that are there."""
        search_path.append(provider="pymerge", path="pkg://pymerge.integrations.fusion_bench_config")
