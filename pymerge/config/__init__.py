"""Configs: the user's YAML as typed models, with errors that name lines."""
