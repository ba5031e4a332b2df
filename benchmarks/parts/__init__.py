"""Merges in parts and by several processes: what they cost beside one merge."""
