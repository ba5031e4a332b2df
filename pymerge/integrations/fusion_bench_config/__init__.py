"""Configs of FusionBench for all methods, which Hydra finds through hydra_plugins.pymerge_config: this package is
imported in every program of Hydra, and imports nothing."""
