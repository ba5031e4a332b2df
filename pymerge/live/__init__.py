"""Merges in memory: into live modules, and many merges of the same models."""
