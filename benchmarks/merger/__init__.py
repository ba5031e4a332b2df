"""Merges in memory that are done again and again."""
